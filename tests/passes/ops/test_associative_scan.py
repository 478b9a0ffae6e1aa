"""`associative_scan` as one operation: JAX's own meaning, mapped too, and seen however the model imported it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import associative_scan as imported_by_name

from passes import compat
from passes.ops.associative_scan import associative_scan
from tests.passes.graphs import names, read, run


def compose(left: Any, right: Any) -> Any:
    """Two steps of `h -> gate * h + value` as one."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def elements(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0.5, 1.0, shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def assert_close(actual: Any, wanted: Any) -> None:
    """Equal up to the order in which float32 products and sums are taken."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_it_is_what_jax_computes(axis: int, reverse: bool):
    elems = elements(5, 7, 3)

    def both(elems):
        wanted = lax.associative_scan(compose, elems, reverse, axis % 3)  # JAX reverses no negative axis
        return associative_scan(compose, elems, reverse, axis), wanted

    assert_close(*jax.jit(both)(elems))


def test_a_function_may_close_over_arrays():
    gate, value = elements(6, 3)

    def both(gate, value):
        def fn(a, b):
            return a * gate[0] + b

        return associative_scan(fn, value), lax.associative_scan(fn, value)

    assert_close(*jax.jit(both)(gate, value))


@pytest.mark.parametrize("in_axes", [(0, 0), (1, None), (None, 2)])
def test_mapped_it_is_what_jax_computes_mapped(in_axes: Any):
    gate, value = elements(4, 4, 4)
    args = [x if axis is not None else x[0] for x, axis in zip((gate, value), in_axes, strict=True)]

    def over(scan):
        return jax.vmap(lambda gate, value: scan(compose, (gate, value), axis=1), in_axes)

    assert_close(jax.jit(over(associative_scan))(*args), jax.jit(over(lax.associative_scan))(*args))


@pytest.mark.parametrize(
    "scan", [lambda *a: lax.associative_scan(*a), lambda *a: jax.lax.associative_scan(*a), imported_by_name]
)
def test_capture_records_one_operation_however_it_was_imported(scan: Any):
    elems = elements(9, 2)
    with compat.captured_associative_scan():
        graph = read(lambda elems: scan(compose, elems), elems)
    assert names(graph)["associative_scan"] == 1 and "pad" not in names(graph)
    assert_close(run(graph, elems), lax.associative_scan(compose, elems))


def test_the_function_is_its_own_again_behind_a_capture_that_fails():
    with pytest.raises(ZeroDivisionError), compat.captured_associative_scan():
        raise ZeroDivisionError
    graph = read(lambda elems: imported_by_name(compose, elems), elements(9, 2))
    assert "associative_scan" not in names(graph)
    assert imported_by_name(jnp.add, jnp.arange(4)).tolist() == [0, 1, 3, 6]
