"""The pass over programs of many layers: what it costs, and where a bisection may stop."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from passes.attention.rewrite import attention
from passes.graph import Graph
from passes.reader import trace
from passes.rewrite import RewriteCounter
from passes.simplify import simplify


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
