"""The pass on training forwards: which layers and heads get which mask, what is computed, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import passes
from passes import compat
from passes.attention.rewrite import attention
from passes.attention.simplify_mask import decompose
from passes.masks import KeyRange, Offset
from passes.numerics import Numerics
from passes.reader import trace
from passes.registry import PASSES, Pass, make_registry
from passes.replay import evaluate
from passes.simplify import simplify
from passes.sparse_attention.language import SparsityError
from passes.sparse_attention.layers import find_layers
from passes.sparse_attention.parser import parse_sparsity
from passes.sparse_attention.pieces import split_heads
from passes.sparse_attention.sparse_attention import sparse_attention
from passes.validation import Validator
from tests.passes.sparse_attention.programs import N, dense, in_a_loop, inputs, weights, written_out

T = 12


def recognised(fn, *args):
    graph, _ = trace(fn, *args)
    simplify(graph)
    assert attention(graph).matched
    return graph


def attentions(graph):
    return [op for _, op in graph.walk() if op.name == "attention"]


def sparse(fn, text, num_layers=3, **options):
    args = weights(num_layers), inputs(T)
    graph = recognised(fn, *args)
    result = sparse_attention(graph, parse_sparsity(text), **options)
    return graph, result, args


def by_head(*rules):
    return jnp.asarray(np.stack([dense(rule, T) for rule in rules]))


@pytest.mark.parametrize(
    "text, heads, num_ops",
    [
        ("all: window(3) | sinks(2)", [["window(3) | sinks(2)"] * N] * 3, 3),
        ("layers[1]: window(3)", [["full"] * N, ["window(3)"] * N, ["full"] * N], 3),
        ("heads[0:half]: window(3)", [["window(3)"] * 2 + ["full"] * 2] * 3, 6),
        (
            "layers[2] heads[1:]: sinks(2)",
            [["full"] * N, ["full"] * N, ["full"] + ["sinks(2)"] * 3],
            5,
        ),  # splits a group
        (
            "heads[3]: full; heads[1:]: window(3); all: sinks(2)",
            [["sinks(2)", "window(3)", "window(3)", "full"]] * 3,
            12,
        ),
    ],
)
def test_heads_see_what_the_clauses_say(text, heads, num_ops):
    graph, result, (w, x) = sparse(written_out, text)
    assert len(attentions(graph)) == num_ops
    found = compat.quick_jit(lambda *leaves: evaluate(graph, leaves))(*jax.tree.leaves((w, x)))[0]
    wanted = compat.quick_jit(written_out)(w, x, [by_head(*rules) for rules in heads])
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(np.asarray(found) - compat.quick_jit(written_out)(w, x)).max() > 1e-2
    validator = Validator()
    assert [validator.check(rewrite).status for rewrite in result.rewrites] == ["valid"] * result.matched


def test_masks_stay_masks_of_the_algebra():
    graph, _, _ = sparse(written_out, "layers[0]: window(3) | sinks(2); all: window(4)")
    first, second, _ = (decompose(op.params["score"]) for op in attentions(graph))
    assert first is not None and first.mask == Offset(0, None) & (Offset(0, 2) | KeyRange(None, 2))
    assert second is not None and second.mask == Offset(0, 3)


def test_what_is_asked_for_already_changes_nothing():
    graph, result, _ = sparse(written_out, "all: window(12); layers[0]: full")
    assert result.matched == 0 and len(attentions(graph)) == 3
    graph, result, _ = sparse(written_out, "all: window(3)")
    assert (result.matched, sparse_attention(graph, parse_sparsity("all: window(3)")).matched) == (3, 0)


def test_layers_in_a_loop_are_counted_and_get_one_mask():
    graph, result, (w, x) = sparse(in_a_loop, "layers[0:3]: window(3)")
    assert [item.layers for item in find_layers(graph)] == [(0, 1, 2)] and result.matched == 1
    found = compat.quick_jit(lambda *leaves: evaluate(graph, leaves))(*jax.tree.leaves((w, x)))[0]
    wanted = compat.quick_jit(written_out)(w, x, [by_head(*["window(3)"] * N)] * 3)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    with pytest.raises(SparsityError, match=r"tells layers 0 and 1 apart, and layers 0 to 2 run in one loop .*; write"):
        sparse(in_a_loop, "layers[0]: window(3)")


def test_densities_are_solved_at_the_longest_sequence():
    graph, result, _ = sparse(written_out, "all: density(0.5)", length=1024)
    form = decompose(attentions(graph)[0].params["score"])
    assert form is not None and form.mask == Offset(0, 3)  # of the 12 keys that there are: 12 (1 - sqrt(0.5))
    (note,) = result.notes
    assert "layers 0 to 2: density(0.5) holds 53.8% of the pairs and 100.0% of the blocks" in note.reason


def test_notes_say_what_is_left_and_what_a_split_group_costs():
    _, result, _ = sparse(written_out, "layers[0:2] heads[1:]: window(3) | sinks(2)")
    notes = [note.reason for note in result.notes]
    assert [note.split(" holds ")[0] for note in notes[:2]] == [
        "layers 0 to 1: head 1: window(3) | sinks(2)",
        "layers 0 to 1: heads 2 to 3: window(3) | sinks(2)",
    ]
    assert "holds 64.1% of the pairs" in notes[0]  # 50 of 78
    (last,) = notes[2:]
    assert last.endswith("query heads of KV head 0 differ, so that keys and values of 1 more KV heads are read")


def test_a_query_left_without_a_key_is_refused():
    with pytest.raises(SparsityError, match=r"sinks\(2\) & window\(3\) leaves the query at position 4 no key"):
        sparse(written_out, "all: sinks(2) & window(3)")


def test_a_program_without_attention_is_told():
    graph, _ = trace(lambda x: x + 1, np.zeros(3, np.float32))
    (remark,) = sparse_attention(graph, parse_sparsity("all: window(3)")).remarks
    assert "no attention was recognised" in remark.reason


@pytest.mark.parametrize(
    "masks, group, expected",
    [
        ("aaaa", 2, [(0, 4, 0, 2)]),
        ("aabb", 2, [(0, 2, 0, 1), (2, 4, 1, 2)]),
        ("abbb", 2, [(0, 1, 0, 1), (1, 2, 0, 1), (2, 4, 1, 2)]),
        ("aaab", 4, [(0, 3, 0, 1), (3, 4, 0, 1)]),
        ("abbbbbba", 2, [(0, 1, 0, 1), (1, 2, 0, 1), (2, 6, 1, 3), (6, 7, 3, 4), (7, 8, 3, 4)]),
        ("ab", 1, [(0, 1, 0, 1), (1, 2, 1, 2)]),
    ],
)
def test_heads_are_split_so_that_kv_heads_have_equally_many(masks, group, expected):
    assert split_heads(list(masks), group) == expected


def test_gradients_flow_through_the_sparse_forward():
    w, x = weights(2), inputs(T)
    pipeline = Pass(
        "sparse_attention", partial(sparse_attention, sparsity=parse_sparsity("all: window(3)")), Numerics.LOSSY
    )
    fn = passes.apply(
        written_out, "simplify,attention,sparse_attention", registry=make_registry([*PASSES.values(), pipeline])
    )
    seen = [by_head(*["window(3)"] * N)] * 2

    def loss(fn, *more):
        return lambda w: jnp.sum(jnp.sin(fn(w, x, *more)))

    found, wanted = jax.jit(jax.grad(loss(fn)))(w), jax.jit(jax.grad(loss(written_out, seen)))(w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
