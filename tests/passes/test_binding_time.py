import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from passes.binding_time import split
from passes.extract import clone, extract
from passes.min_cut import min_vertex_cut
from passes.simplify import simplify
from passes.verify import verify
from tests.passes.graphs import assert_same_bits, names, read, run


def parts(fn, *args):
    """Splits `fn(params, x)` with `params` known, checks that both parts together equal it; returns the split."""
    graph = read(fn, *args)
    before = names(graph)
    num_params = len(jax.tree.leaves(args[0]))
    result = split(graph, [i < num_params for i in range(len(graph.inputs))])
    assert names(graph) == before
    verify(result.prepare)
    verify(result.step)
    packed = run(result.prepare, args[0])
    assert_same_bits(run(result.step, packed, args[1:]), jax.jit(fn)(*args))
    return result


W, X = jnp.arange(12.0).reshape(3, 4) / 7, jnp.arange(6.0).reshape(2, 3) / 5


def test_what_parameters_alone_determine_is_prepared():
    result = parts(lambda w, x: x @ jnp.tanh(w * 2 + 1).T.T, W, X)
    assert names(result.step) == {"dot_general": 1}
    assert result.packed_bytes == W.nbytes


def test_a_value_larger_than_what_it_is_made_of_does_not_cross():
    result = parts(lambda w, x: x @ jnp.repeat(w, 5, axis=1), W, X)
    assert result.packed_bytes == W.nbytes and "dot_general" not in names(result.prepare)
    q, scale = jnp.ones((3, 4), jnp.int8), jnp.ones((1, 4))
    result = parts(lambda p, x: x @ (p[0].astype(jnp.float32) * p[1]), (q, scale), X)
    assert result.packed_bytes == q.nbytes + scale.nbytes and names(result.prepare) == {}


def test_a_smaller_value_crosses():
    result = parts(lambda w, x: x * w.sum(1), W, X)
    assert result.packed_bytes == 3 * 4 and names(result.step)["reduce_sum"] == 0


def test_quantizing_in_the_program_happens_once():
    def fn(w, x):
        scale = jnp.abs(w).max(0, keepdims=True) / 127
        return x @ (jnp.round(w / scale).astype(jnp.int8).astype(jnp.float32) * scale)

    result = parts(fn, W, X)
    assert result.packed_bytes == W.size + 4 * 4
    assert names(result.step)["round"] == 0 and names(result.step)["convert_element_type"] == 1


def test_one_crossing_value_serves_several_readers():
    result = parts(lambda w, x: (x @ (w * 2), x @ (w * 3), x @ jnp.exp(w)), W, X)
    assert result.packed_bytes == W.nbytes


def test_two_sources_merge_into_one_crossing_value():
    result = parts(lambda p, x: x @ (p[0] + p[1]), (W, W * 2), X)
    assert result.packed_bytes == W.nbytes and names(result.prepare) == {"add": 1}


def test_constants_are_made_again():
    result = parts(lambda w, x: x @ w + jnp.cos(jnp.arange(4.0)), W, X)
    assert names(result.step)["cos"] == 1 and result.packed_bytes == W.nbytes


def test_unread_parameters_do_not_cross_and_outputs_may():
    result = parts(lambda p, x: (p[0] * 2, x), (W, W), X)
    assert len(result.prepare.outputs) == 1 and names(result.step) == {}


def test_loops_over_the_other_arguments_stay_and_loops_over_parameters_move():
    def fn(w, x):
        table = lax.scan(lambda c, row: (c + row, None), w[0], w)[0]
        return lax.scan(lambda c, row: (c * row, c), table, x[0])[1]

    result = parts(fn, W, X)
    assert names(result.prepare)["scan"] == names(result.step)["scan"] == 1


def test_effects_stay_in_the_step_and_happen_once():
    seen = []

    def fn(w, x):
        jax.debug.callback(seen.append, w.sum())
        return x @ (w + 1)

    graph = read(fn, W, X)
    result = split(graph, [True, False])
    packed = run(result.prepare, W)
    jax.effects_barrier()
    assert not seen
    run(result.step, packed, X)
    jax.effects_barrier()
    assert len(seen) == 1


def test_the_parts_share_nothing_that_passes_change():
    graph = read(lambda w, x: lax.scan(lambda c, r: (c * 1.0 + r, None), x[0], w.T)[0], W, X)
    result = split(graph, [True, False])
    before = names(graph)
    simplify(result.step)
    assert names(graph) == before != names(result.step)
    simplify(clone(graph))
    assert names(graph) == before


def test_extraction_names_a_missing_input():
    graph = read(lambda w, x: x @ w, W, X)
    with pytest.raises(ValueError, match="need input 0 of the graph too"):
        extract(graph, graph.inputs[1:], graph.outputs)


@st.composite
def dags(draw):
    n = draw(st.integers(1, 7))
    weights = {i: draw(st.integers(0, 5)) for i in range(n)}
    pairs = [(a, b) for a, b in itertools.combinations(range(n), 2) if draw(st.booleans())]
    chosen = st.lists(st.integers(0, n - 1), max_size=3)
    return weights, pairs, draw(chosen), draw(chosen)


def separates(cut, edges, sources, sinks) -> bool:
    reached = {v for v in sources if v not in cut}
    for a, b in sorted(edges):
        if a in reached and b not in cut:
            reached.add(b)
    return not reached & set(sinks)


@settings(deadline=None, max_examples=150)
@given(dags())
def test_a_cut_separates_and_none_is_cheaper(dag):
    weights, edges, sources, sinks = dag
    cut = min_vertex_cut(weights, edges, sources, sinks)
    assert separates(cut, edges, sources, sinks)
    subsets = itertools.chain.from_iterable(itertools.combinations(weights, k) for k in range(len(weights) + 1))
    best = min(sum(weights[v] for v in s) for s in subsets if separates(set(s), edges, sources, sinks))
    assert sum(weights[v] for v in cut) == best


def test_of_equal_cuts_the_one_nearest_the_sinks_is_taken():
    assert min_vertex_cut({"a": 2, "b": 2, "c": 2, "d": 3}, [("a", "b"), ("b", "c"), ("c", "d")], ["a"], ["d"]) == {"c"}


def test_packing_is_never_larger_than_the_parameters():
    params = {"w": W, "v": W * 2, "b": jnp.ones(4)}

    def fn(p, x):
        big = jnp.outer(p["b"], p["b"]).ravel()[:4]
        return x @ (p["w"] @ p["v"].T @ p["w"]) + jnp.exp(p["b"]) + big

    assert parts(fn, params, X).packed_bytes <= sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
