"""Large constants become inputs; what a program computes stays."""

import jax
import jax.numpy as jnp
import numpy as np

from passes.lift_constants import lift_constants
from passes.reader import trace
from passes.replay import evaluate

TABLE = np.random.RandomState(0).randn(40, 40).astype(np.float32)
X = np.random.RandomState(1).randn(3, 40).astype(np.float32)


def test_a_large_constant_becomes_one_input_however_often_it_is_read():
    def fn(x):
        return x @ jnp.asarray(TABLE) + (x @ jnp.asarray(TABLE)).sum() + jnp.asarray([1.0, 2.0])[0]

    graph, _ = trace(fn, X)
    constants = lift_constants(graph, min_bytes=1000)
    assert len(constants) == 1 and len(graph.inputs) == 2
    np.testing.assert_array_equal(constants[0], TABLE)
    np.testing.assert_allclose(evaluate(graph, [X, TABLE])[0], jax.jit(fn)(X), rtol=1e-6)
    other = evaluate(graph, [X, 2 * TABLE])[0]
    assert not np.allclose(other, jax.jit(fn)(X)), "the constant is still inside"


def test_small_constants_stay_and_a_second_run_changes_nothing():
    graph, _ = trace(lambda x: x + jnp.asarray(TABLE[0]), X)
    assert lift_constants(graph, min_bytes=1000) == [] and len(graph.inputs) == 1
    graph, _ = trace(lambda x: x @ jnp.asarray(TABLE), X)
    assert len(lift_constants(graph, min_bytes=1000)) == 1 and lift_constants(graph, min_bytes=1000) == []


def test_a_constant_that_is_an_output_is_lifted():
    graph, _ = trace(lambda x: jnp.asarray(TABLE), X)
    assert len(lift_constants(graph, min_bytes=1000)) == 1
    np.testing.assert_array_equal(evaluate(graph, [X, TABLE])[0], TABLE)
