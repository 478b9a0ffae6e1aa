from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

from passes.cse import cse, param_key
from passes.dce import dce
from passes.verify import verify
from tests.passes.graphs import assert_same_bits, names, read, run

X = jnp.sin(jnp.arange(4.0)).reshape(2, 2)


def merged(fn, *args) -> int:
    """Merges, checks that nothing changed and that a second run finds nothing; returns the number merged."""
    graph = read(fn, *args)
    count = cse(graph).matched
    verify(graph)
    assert_same_bits(run(graph, *args), jax.jit(fn)(*args))
    assert cse(graph).matched == 0
    return count


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_equal_operations_merge_in_chains(dtype):
    x = X.astype(dtype)
    assert merged(lambda x: (x + x.T) * (x + x.T), x) == 2
    assert merged(lambda x: (x * 2, x * 2, x + np.full((2, 2), 3, x.dtype), x + np.full((2, 2), 3, x.dtype)), x) == 2


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.sum(0), x.sum(1)),
        lambda x: (x - x.T, x.T - x * 1),
        lambda x: (x * 0.0, x * -0.0),
        lambda x: (x + np.full((2, 2), np.nan, np.float32), x + np.full((2, 2), -np.nan, np.float32)),
        lambda x: (lax.integer_pow(x, 2), lax.integer_pow(x, 3)),
        lambda x: (x.astype(jnp.bfloat16), x.astype(jnp.float16)),
        lambda x: (lax.optimization_barrier(x), lax.optimization_barrier(x)),
        lambda x: (checkpoint_name(x, "a"), checkpoint_name(x, "b")),
    ],
)
def test_near_misses_do_not_merge(fn):
    graph = read(fn, X)
    transposes = names(graph)["transpose"]
    assert cse(graph).matched == max(transposes - 1, 0)
    assert_same_bits(run(graph, X), jax.jit(fn)(X))


def test_loops_of_equal_structure_merge_and_others_do_not():
    def loop(x, scale):
        return lax.fori_loop(0, 3, lambda _, y: y @ x * scale, x)

    assert merged(lambda x: loop(x, 2.0) + loop(x, 2.0), X) == 1
    assert merged(lambda x: loop(x, 2.0) + loop(x, 3.0), X) == 0


def test_effects_are_never_merged_or_dropped():
    def fn(x):
        for _ in range(2):
            io_callback(print, None, x)
        return x

    graph = read(fn, X)
    before = names(graph)
    assert cse(graph).matched == dce(graph).matched == 0
    assert names(graph) == before and sum(before.values()) == 2


def test_parameters_of_different_type_have_different_keys():
    keys = [param_key(p) for p in (True, 1, 1.0, 0.0, -0.0, (1,), [1], {"a": 1}, None)]
    assert len(set(keys)) == len(keys)
    assert param_key({"a": np.arange(3)}) == param_key({"a": np.arange(3)})


def dropped(fn, *args, left: dict):
    graph = read(fn, *args)
    dce(graph)
    verify(graph)
    assert names(graph) == left
    assert_same_bits(run(graph, *args), jax.jit(fn)(*args))
    assert dce(graph).matched == 0
    return graph


def test_dead_operations_go():
    def fn(x):
        _ = jnp.sin(x) @ x
        return x + 1

    dropped(fn, X, left={"add": 1})


def test_dead_carries_outputs_and_operands_of_a_scan_go():
    def fn(x, w):
        def step(carry, row):
            live, helper, dead = carry
            return (live + helper, helper * 2, dead @ w), (row * 2, jnp.sin(row))

        (live, _, _), (doubled, _) = lax.scan(step, (x[0], x[1], x), (x, x)[0])
        return live, doubled

    graph = dropped(fn, X, X, left=names(read(fn, X, X)) - Counter(["dot_general", "sin"]))
    (scan,) = [op for op in graph.ops if op.name == "scan"]
    assert len(scan.operands) == 3 and len(scan.results) == 3 and len(scan.regions[0].outputs) == 3


def test_carries_that_the_condition_reads_stay():
    def fn(x):
        return lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 2, c[1] + 1, c[2] @ x), (x, 0, x))[0]

    graph = dropped(fn, X, left={"while": 1, "lt": 1, "mul": 1, "add": 1})
    assert len(graph.ops[0].results) == 2


def test_unread_results_and_operands_of_branches_go():
    def fn(x, y):
        return lax.cond(x.sum() > 0, lambda a, b: (a + 1, b @ b), lambda a, b: (a - 1, jnp.sin(b)), x, y)[0]

    graph = read(fn, X, X)
    dce(graph)
    verify(graph)
    (cond,) = [op for op in graph.ops if op.name == "cond"]
    assert len(cond.operands) == 2 and len(cond.results) == 1
    assert not names(graph).keys() & {"dot_general", "sin"}
    assert_same_bits(run(graph, X, X), jax.jit(fn)(X, X))


def test_loops_with_effects_keep_what_the_effects_read():
    seen = []

    def fn(x):
        def step(carry, row):
            jax.debug.callback(seen.append, carry)
            return carry + row.sum(), None

        lax.scan(step, 0.0, x)
        return x

    graph = read(fn, X)
    dce(graph)
    verify(graph)
    run(graph, X)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), sorted([0.0, float(X[0].sum())]), rtol=1e-6)


def test_inputs_that_nothing_reads_stay():
    graph = dropped(lambda x, y: x, X, X, left={})
    assert len(graph.inputs) == 2
