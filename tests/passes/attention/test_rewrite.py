"""The pass over programs of many layers: what it costs, and where a bisection may stop."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.attention.rewrite import attention
from passes.graph import Graph
from passes.reader import trace
from passes.rewrite import RewriteCounter
from passes.simplify import simplify
from tests.passes.attention.checking import assert_found


def layers(num_layers: int) -> Graph:
    def fn(x):
        for _ in range(num_layers):
            scores = jnp.einsum("btnh,bsnh->bnts", x, jnp.sin(x))
            seen = jnp.tril(jnp.ones((8, 8), bool))
            x = x + jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30), -1), jnp.cos(x))
        return x

    graph, _ = trace(fn, jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32))
    simplify(graph)
    return graph


def found_in(graph: Graph) -> int:
    return sum(op.name == "attention" for op in graph.ops)


def lines_run(num_layers: int) -> int:
    """How many lines of the passes run for one run of the pass."""
    graph, count = layers(num_layers), 0

    def line(frame, event, _):
        nonlocal count
        count += event == "line"
        return line

    def trace_passes(frame, event, _):
        return line if "/passes/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace_passes)
    try:
        attention(graph)
    finally:
        sys.settrace(before)
    assert found_in(graph) == num_layers
    return count


def test_the_work_grows_with_the_number_of_layers_and_no_faster():
    lines_run(1)  # what is done once is done
    assert lines_run(24) < 6.3 * lines_run(4)


@pytest.mark.parametrize("limit", [0, 2])
def test_a_bisection_stops_between_two_attentions(limit):
    graph, counter = layers(3), RewriteCounter(limit)
    assert attention(graph, counter).matched == limit and found_in(graph) == limit
    assert len(counter.made) == limit and all(name.startswith("attention at test_rewrite.py:") for name in counter.made)


def test_each_attention_is_one_rewrite_and_a_second_run_makes_none():
    graph = layers(3)
    result = attention(graph)
    assert result.matched == len(result.rewrites) == 3
    assert attention(graph).matched == 0


def _grouped(q, k, v, seen):
    scores = jnp.where(seen, jnp.einsum("bkgh,bskh->bkgs", q, k), -1e9)
    return jnp.einsum("bkgs,bskh->bkgh", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize(("num_shared", "num_keys"), [(3, 5), (5, 5), (7, 5)])
def test_heads_that_share_keys_are_no_queries_where_the_mask_knows_one_position(num_shared, num_keys):
    """As in a step of one token; there may be as many heads as keys."""
    q = np.random.RandomState(0).randn(2, 3, num_shared, 4).astype(np.float32)
    k, v = np.random.RandomState(1).randn(2, 2, num_keys, 3, 4).astype(np.float32)

    def step(q, k, v, start):
        return _grouped(q, k, v, (jnp.arange(num_keys) <= start[:, None])[:, None, None])

    args = (q, k, v, np.int32([3, 0]))
    (op,) = [op for op in assert_found("a step", step, args).ops if op.name == "attention"]
    assert op.operands[0].shape == (2, 1, 3 * num_shared, 4)


def test_queries_of_a_padded_sequence_are_queries():
    """`k < length` says nothing of where queries stand."""
    q, k, v = np.random.RandomState(0).randn(3, 2, 3, 5, 4).astype(np.float32)

    def fn(q, k, v, length):
        return _grouped(q, k.swapaxes(1, 2), v.swapaxes(1, 2), (jnp.arange(5) < length[:, None])[:, None, None])

    (op,) = [op for op in assert_found("padded", fn, (q, k, v, np.int32([3, 5]))).ops if op.name == "attention"]
    assert op.operands[0].shape == (2, 5, 3, 4)
