"""Which weights are laid out in rows, that a tied table is kept once, and that nothing is computed otherwise."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.binding_time import split
from passes.rewrite import RewriteCounter
from passes.simplify import simplify
from passes.transform import name_parameters
from passes.validation import Validator
from passes.verify import verify
from passes.weight_rows import weight_rows
from tests.passes.graphs import names, read, run


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(2, 5, 64, seed=9)
IDS = jnp.asarray([[1, 4, 0], [7, 2, 2]])


def program(fn, params, *args):
    """The simplified graph of `fn(params, *args)`, its parameters named."""
    graph = read(fn, params, *args)
    name_parameters(graph, (params, *args), (0,))
    simplify(graph)
    return graph


def in_rows(fn, params, *args, refusal=lambda x, rows: None, counter=None):
    graph = program(fn, params, *args)
    result = weight_rows(graph, counter, refusal=refusal)
    verify(graph)
    return graph, result


SPELLINGS = {
    "columns": (lambda p, x: x @ p["w"], {"w": normal(64, 48)}),
    "rows": (lambda p, x: x @ p["w"].T, {"w": normal(48, 64)}),
    "weight first": (lambda p, x: jnp.einsum("kn,btk->nbt", p["w"], x), {"w": normal(64, 48)}),
    "heads": (lambda p, x: jnp.einsum("btk,hkd->bthd", x, p["w"]), {"w": normal(4, 64, 12)}),
    "two contracted": (
        lambda p, x: jnp.einsum("bthd,hdk->btk", x.reshape(2, 5, 4, 16), p["w"]),
        {"w": normal(4, 16, 48)},
    ),
    "sums of weights": (lambda p, x: x @ (p["w"] + 2 * p["v"]), {"w": normal(64, 48), "v": normal(64, 48, seed=1)}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_products_in_any_layout_read_rows(name):
    fn, params = SPELLINGS[name]
    graph, result = in_rows(fn, params, X)
    assert result.matched == 1 and "weight_dot" in names(graph) and "dot_general" not in names(graph)
    (op,) = [op for op in graph.ops if op.name == "weight_dot"]
    assert op.operands[1].shape == (48, 64) and op.operands[0].shape[-1] == 64
    (have,) = run(graph, params, X)
    np.testing.assert_allclose(have, fn(params, X), rtol=1e-5, atol=1e-5)
    (rewrite,) = result.rewrites
    assert Validator().check(rewrite).status == "valid"


def test_rows_are_made_once_and_kept():
    params = {"w": normal(64, 48)}
    graph, _ = in_rows(lambda p, x: jnp.tanh(x @ p["w"]), params, X)
    parts = split(graph, [True, False])
    assert [v.shape for v in parts.prepare.outputs] == [(48, 64)]
    assert "transpose" not in names(parts.step)


def test_a_tied_table_is_kept_as_it_lies():
    def fn(p, ids):
        x = p["table"][ids]
        return x @ p["table"].T

    params = {"table": normal(8, 64)}
    graph, result = in_rows(fn, params, IDS)
    assert result.matched == 1
    parts = split(graph, [True, False])
    assert [v.path for v in parts.prepare.outputs] == ["table"]
    np.testing.assert_allclose(run(graph, params, IDS)[0], fn(params, IDS), rtol=1e-5, atol=1e-5)


def test_a_weight_that_something_else_reads_as_it_lies_is_not_kept_twice():
    def fn(p, x, ids):
        return x @ p["w"], p["w"][ids]

    graph, result = in_rows(fn, {"w": normal(64, 48)}, X, IDS)
    assert result.matched == 0 and "weight_dot" not in names(graph)
    assert "reads it as it lies" in str(result.remarks[0])


def test_weights_of_loops_stay_in_their_stack():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    graph, result = in_rows(fn, {"w": normal(3, 64, 64)}, X)
    assert result.matched == 0 and "scan" in names(graph)


def test_a_target_refuses_and_a_counter_stops():
    params = {"w": normal(64, 48), "v": normal(48, 16)}
    fn = lambda p, x: (x @ p["w"]) @ p["v"]
    seen = []
    _, result = in_rows(fn, params, X, refusal=lambda x, rows: seen.append((x.shape[-1], rows.shape)) or "too odd")
    assert result.matched == 0 and {str(r).rpartition(": ")[2] for r in result.remarks} == {"too odd"}
    assert sorted(seen) == [(48, (16, 48)), (64, (48, 64))]
    _, result = in_rows(fn, params, X, counter=RewriteCounter(1))
    assert result.matched == 1


def test_again_changes_nothing():
    params = {"w": normal(64, 48)}
    graph, _ = in_rows(lambda p, x: x @ p["w"], params, X)
    assert weight_rows(graph, refusal=lambda x, rows: None).matched == 0
