"""Helpers that read, run and count graphs in tests."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from passes.graph import Graph
from passes.reader import trace
from passes.replay import evaluate


def read(fn, *args) -> Graph:
    """The graph of `fn` on arrays."""
    return trace(fn, *args)[0]


def run(graph: Graph, *args) -> list:
    """Runs a graph on the flattened arguments, compiled."""
    return jax.jit(lambda *leaves: evaluate(graph, leaves))(*jax.tree.leaves(args))


def names(graph: Graph) -> Counter:
    """How often each operation stands in a graph, regions counted once."""
    return Counter(op.name for _, op in graph.walk())


def assert_same_bits(actual, expected) -> None:
    """Equal structure, dtypes and bits; NaNs equal each other, zeros of opposite sign do not."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(np.float64), b.astype(np.float64)  # NumPy's comparison knows no NaN of bfloat16
            np.testing.assert_array_equal(np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)])
        np.testing.assert_array_equal(a, b)
