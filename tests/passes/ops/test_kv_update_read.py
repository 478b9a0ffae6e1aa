"""`kv_update_read`: what it means, how it maps over requests, and that a donated pool is updated in place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.ops.kv_update_read import kv_update_read
from tests.compiler import zoo
from tests.compiler.serving import Turn, derive_model, step_inputs

NUM_PAGES, PAGE_SIZE, ROW = 5, 4, (2, 3)
DROPPED = np.iinfo(np.int32).max


def make_pool(*lead: int) -> np.ndarray:
    shape = (*lead, NUM_PAGES, PAGE_SIZE, *ROW)
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape) + 1000


def make_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *ROW)).astype(np.float32)


def expected(pool: np.ndarray, layers: Sequence[int], rows: Any, positions: Any, pages: Any, length: int) -> Any:
    """The documented meaning, row by row."""
    pool = pool.copy()
    for row, position in zip(rows, positions, strict=True):
        if 0 <= position < len(pages) * PAGE_SIZE:
            pool[(*layers, pages[position // PAGE_SIZE], position % PAGE_SIZE)] = row
    view = np.stack([pool[(*layers, pages[s // PAGE_SIZE], s % PAGE_SIZE)] for s in range(length)])
    return view, pool


@pytest.mark.parametrize(
    ("lead", "layers", "positions", "pages", "length"),
    [
        ((), (), [0, 1], [3], 4),
        ((), (), [2], [0], 3),  # fewer positions read than the page holds
        ((), (), [3, 4, 5, 11], [4, 0, 2], 12),  # across pages that lie out of order
        ((), (), [6, 7], [1, 3, 0], 9),  # the last page read in part
        ((2,), (1,), [0, 4], [2, 1], 8),
        ((2, 3), (0, 2), [5], [2, 1], 8),
        ((), (), [3, 4, DROPPED], [3], 4),  # past the only page, and padding
        ((), (), [-1, 0], [3], 4),  # a negative position is no position from the end
        ((), (), [8, 7, DROPPED], [3, 1], 8),
    ],
)
def test_meaning(lead, layers, positions, pages, length, strict_jax):
    pool, rows = make_pool(*lead), make_rows(len(positions))

    @jax.jit
    def run(pool, rows, positions, pages):
        return kv_update_read(pool, [jnp.int32(i) for i in layers], rows, positions, pages, length=length)

    got = run(pool, rows, jnp.asarray(positions, jnp.int32), jnp.asarray(pages, jnp.int32))
    for actual, wanted in zip(got, expected(pool, layers, rows, positions, pages, length), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), wanted)


@pytest.mark.parametrize(
    ("lead", "layers", "positions", "pages", "reads"),
    [
        ((), (), [0, 1], [3], [0, 1, 3]),
        ((), (), [7, 8], [4, 0, 2], [0, 5, 6, 7, 8]),  # across pages that lie out of order, the new rows among them
        ((2,), (1,), [4], [2, 1], [4, 4, 0]),  # one twice, and backwards
        ((2, 3), (0, 2), [DROPPED], [2, 1], [7]),
        ((), (), [3], [4, 0], [-2, 8, 99]),  # outside: the nearest
        ((), (), [], [4, 0], [1, 6]),  # nothing is written
    ],
)
def test_reads_at_given_positions(lead, layers, positions, pages, reads, strict_jax):
    pool, rows = make_pool(*lead), make_rows(len(positions))

    @jax.jit
    def run(pool, rows, positions, pages, reads):
        return kv_update_read(pool, [jnp.int32(i) for i in layers], rows, positions, pages, reads=reads)

    got = run(pool, rows, *(jnp.asarray(x, jnp.int32) for x in (positions, pages, reads)))
    view, after = expected(pool, layers, rows, positions, pages, len(pages) * PAGE_SIZE)
    np.testing.assert_array_equal(np.asarray(got[0]), view[np.clip(reads, 0, len(view) - 1)])
    np.testing.assert_array_equal(np.asarray(got[1]), after)


def test_reads_a_request_are_mapped():
    pool, rows = make_pool(), np.stack([make_rows(2, seed) for seed in range(2)])
    positions, pages = np.array([[3, 4], [0, DROPPED]], np.int32), np.array([[4, 0], [2, 4]], np.int32)
    reads = np.array([[3, 4, 0], [4, 7, 0]], np.int32)  # page 4 belongs to both; the second reads what the first wrote

    def one(rows: Any, positions: Any, pages: Any, reads: Any) -> Any:
        return kv_update_read(pool, [], rows, positions, pages, reads=reads)

    jaxpr = jax.make_jaxpr(jax.vmap(one, out_axes=(0, None)))(rows, positions, pages, reads)
    assert [e.primitive.name for e in jaxpr.eqns].count("kv_update_read") == 1
    views, after = jax.jit(jax.vmap(one, out_axes=(0, None)))(rows, positions, pages, reads)
    wanted = pool
    for r in range(2):
        _, wanted = expected(wanted, (), rows[r], positions[r], pages[r], 1)
    for r in range(2):
        view, _ = expected(wanted, (), [], [], pages[r], 2 * PAGE_SIZE)
        np.testing.assert_array_equal(np.asarray(views[r]), view[reads[r]])
    np.testing.assert_array_equal(np.asarray(after), wanted)


def test_a_length_and_positions_are_not_both_read():
    args = (make_pool(), [], make_rows(1), np.zeros(1, np.int32), np.zeros(1, np.int32))
    for given in ({}, {"length": 4, "reads": np.zeros(1, np.int32)}):
        with pytest.raises(ValueError, match="a length or positions, got both or neither"):
            kv_update_read(*args, **given)


def mapped(pool: Any, rows: Any, positions: Any, pages: Any, in_axes: Any = (0, 0, 0)) -> Any:
    def one(rows: Any, positions: Any, pages: Any) -> Any:
        return kv_update_read(pool, [], rows, positions, pages, length=2 * PAGE_SIZE)

    return jax.vmap(one, in_axes, out_axes=(0, None))(rows, positions, pages)


def test_mapped_over_requests_is_one_request_after_another():
    pool, rows = make_pool(), np.stack([make_rows(2, seed) for seed in range(2)])
    positions, pages = np.array([[3, 4], [0, DROPPED]], np.int32), np.array([[4, 0], [2, 1]], np.int32)
    views, after = jax.jit(mapped)(pool, rows, positions, pages)
    wanted = pool
    for r in range(2):
        view, wanted = expected(wanted, (), rows[r], positions[r], pages[r], 2 * PAGE_SIZE)
        np.testing.assert_array_equal(np.asarray(views[r]), view)
    np.testing.assert_array_equal(np.asarray(after), wanted)


def test_mapped_over_requests_with_equal_rows():
    pool, rows = make_pool(), make_rows(2)
    positions, pages = np.array([3, 4], np.int32), np.array([[4, 0], [2, 1]], np.int32)
    views, after = jax.jit(lambda *args: mapped(*args, in_axes=(None, None, 0)))(pool, rows, positions, pages)
    assert views.shape == (2, 2 * PAGE_SIZE, *ROW)
    for r in range(2):
        np.testing.assert_array_equal(np.asarray(after)[pages[r, [0, 1]], [3, 0]], rows)


def test_batching_keeps_one_operation_and_the_pool_unbatched():
    pool, rows = make_pool(), np.stack([make_rows(2, seed) for seed in range(3)])
    positions, pages = np.zeros((3, 2), np.int32), np.zeros((3, 2), np.int32)
    jaxpr = jax.make_jaxpr(mapped)(pool, rows, positions, pages)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "kv_update_read"]
    assert eqn.invars[0].aval.shape == eqn.outvars[1].aval.shape == pool.shape
    assert not [e for e in jaxpr.eqns if any(v.aval.shape[-4:] == pool.shape and v.aval.ndim > 4 for v in e.outvars)]


@pytest.mark.parametrize("in_axes", [(0, None, None, None), (None, None, None, None, 0)])
def test_a_pool_or_layer_a_request_is_declined(in_axes):
    def one(pool: Any, rows: Any, positions: Any, pages: Any, layer: Any = 0) -> Any:
        lead = pool[None] if pool.ndim == 4 else pool
        return kv_update_read(lead, [layer], rows, positions, pages, length=4)

    args = [make_pool(2), make_rows(1), np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(2, np.int32)]
    with pytest.raises(NotImplementedError, match="the pool and layer indices are shared"):
        jax.make_jaxpr(jax.vmap(one, in_axes))(*args[: len(in_axes)])


def test_rows_of_another_shape_are_an_error():
    args = (make_pool(), np.zeros((2, 3, 2), np.float32), np.zeros(2, np.int32), np.zeros(1, np.int32))
    with pytest.raises(ValueError, match=r"rows must be \(2, 2, 3\), got \(2, 3, 2\)"):
        jax.eval_shape(lambda pool, *rest: kv_update_read(pool, [], *rest, length=4), *args)


# ------------------------------------------------------------------------------------------ in the compiled step
def copied_elements(hlo: str) -> list[int]:
    """Sizes of everything that a compiled module copies, in fusions and loops too."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* copy(?:-start)?\(", hlo)
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize(("name", "unroll"), [("mha", True), ("scan_layers", True), ("scan_layers", False)])
def test_decode_step_copies_no_donated_pool(name: str, unroll: bool):
    (model,) = [m for m in zoo.SERVED if m.name == name]
    derived = derive_model(model, unroll=unroll)
    program, state = derived.program, derived.program.init_state()
    inputs = step_inputs(np.ones((2, model.test_length), np.int32), Turn(1, (4, 7), (1, 1)), program)
    step = jax.jit(lambda p, s, i: program.logits(p, s, i, last_row=True), donate_argnums=1)
    module = step.lower(jax.tree.leaves(derived.params), state, inputs).compile().as_text()
    pools = [math.prod(pool.shape) for pool in state.pools]
    assert pools and module.count("may-alias") + module.count("must-alias") >= len(pools)
    assert all(size < min(pools) for size in copied_elements(module))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_reads_at_positions_copy_no_donated_pool(num_layers: int):
    """Layer after layer, each also read a second time, as heads with another window do."""
    pool, rows = make_pool(num_layers), np.stack([make_rows(1)] * 2)
    positions, pages = np.array([[3], [1]], np.int32), np.array([[4, 0], [2, 1]], np.int32)
    reads = np.array([[3, 4, 0], [4, 7, 0]], np.int32)

    def step(pool: Any, rows: Any) -> Any:
        for layer in range(num_layers):

            def one(rows: Any, positions: Any, pages: Any, reads: Any, pool: Any = pool, layer: int = layer) -> Any:
                view, after = kv_update_read(pool, [jnp.int32(layer)], rows, positions, pages, reads=reads)
                none = rows[:0], positions[:0]
                again, after = kv_update_read(after, [jnp.int32(layer)], *none, pages, reads=reads[:1])
                return (view, again), after

            (view, again), pool = jax.vmap(one, out_axes=(0, None))(rows, positions, pages, reads)
            rows = rows + jnp.sum(view, axis=1, keepdims=True) + again
        return rows, pool

    module = jax.jit(step, donate_argnums=0).lower(pool, rows).compile().as_text()
    assert "may-alias" in module or "must-alias" in module
    assert all(size < pool.size for size in copied_elements(module))


def test_a_pool_that_is_read_before_it_is_written_is_seen_to_be_copied():
    """The reason for the operation, and that the test above can tell."""

    @jax.jit
    def read_then_write(pool: Any, row: Any) -> Any:
        return pool[1] * 2.0, pool.at[1, 2].set(row)

    def lowered(fn: Any, *args: Any) -> str:
        return jax.jit(fn, donate_argnums=0).lower(*args).compile().as_text()

    pool = make_pool()
    assert max(copied_elements(lowered(read_then_write, pool, make_rows(1)[0])), default=0) >= pool.size
