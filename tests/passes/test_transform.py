import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import passes
from passes.manager import PassOptions
from tests.passes.graphs import assert_same_bits
from tests.passes.programs import DIFFERENTIABLE, PROGRAMS

X = jnp.sin(jnp.arange(16.0)).reshape(4, 4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_simplified_programs_give_the_same_bits_under_jit(name):
    assert_same_bits(jax.jit(passes.apply(PROGRAMS[name], "simplify"))(X), jax.jit(PROGRAMS[name])(X))


def total(fn):
    return lambda x: sum(jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) for y in jax.tree.leaves(fn(x)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_those_of_the_function(name):
    fn = PROGRAMS[name]
    expected = jax.jit(jax.grad(total(fn)))(X)
    actual = jax.jit(jax.grad(total(passes.apply(fn, "simplify"))))(X)
    # Cotangents of one value are summed in another order once operands are: a few float32 ulp of the largest.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * float(jnp.abs(expected).max()))


QUICK = ("scanned", "conditional", "custom_vjp", "indexing", "narrow")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PROGRAMS])
def test_vmap_equals_that_of_the_function(name):
    xs = jnp.stack([X, -X, X * 0.5])
    fn = PROGRAMS[name]
    actual = jax.tree.leaves(jax.jit(jax.vmap(passes.apply(fn, "simplify")))(xs))
    for a, b in zip(actual, jax.tree.leaves(jax.jit(jax.vmap(fn))(xs)), strict=True):
        # Batched dots and reductions may be tiled otherwise once operands are ordered.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_stop_gradient_holds():
    fn = passes.apply(lambda x: (x * lax.stop_gradient(x)).sum(), "simplify")
    assert_same_bits(jax.grad(fn)(X), X)


def test_pytrees_keywords_and_python_scalars_pass_through():
    def fn(params, *, scale, extra=None):
        return {"out": params["w"] * scale, "extra": extra, "tuple": (params["b"],)}

    params = {"w": X, "b": jnp.int32(3)}
    assert_same_bits(passes.apply(fn, "simplify")(params, scale=2.0), fn(params, scale=2.0))
    assert passes.apply(fn, "simplify")(params, scale=2.0)["extra"] is None


def test_each_signature_is_traced_once():
    traces = []

    def fn(x):
        traces.append(x.shape)
        return x + 1

    rewritten = passes.apply(fn, "canonicalize,cse,dce")
    for x in [X, X * 2, X[:2], X.astype(jnp.int32), X]:
        assert_same_bits(rewritten(x), x + 1)
    assert traces == [(4, 4), (2, 4), (4, 4)]


def test_weak_types_of_results_stay():
    fn = lambda x, y: (x * 1, y + 0, 2.0 * x)
    expected = jax.eval_shape(fn, 1.5, jnp.int32(2))
    actual = jax.eval_shape(passes.apply(fn, "simplify"), 1.5, jnp.int32(2))
    assert [(x.dtype, x.weak_type) for x in actual] == [(x.dtype, x.weak_type) for x in expected]


def test_closing_over_traced_values_is_refused():
    def outer(x):
        return passes.apply(lambda y: y * x, "simplify")(x)

    with pytest.raises(NotImplementedError, match="closes over traced values"):
        jax.jit(outer)(X)


def test_unknown_passes_are_named():
    with pytest.raises(ValueError, match="'fuse_everything'; known: canonicalize"):
        passes.apply(lambda x: x, "cse,fuse_everything")


def test_options_reach_the_manager():
    with pytest.raises(ValueError, match="stop_after"):
        passes.apply(lambda x: x, "cse", options=PassOptions(stop_after="dce"))
