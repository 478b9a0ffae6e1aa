"""Biases of scores, which the native kernel of CPUs gets as arrays: along the axes that they differ on and no other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastgpt_jax.kernels.attention import attention, reference
from fastgpt_jax.kernels.attention.spec import AttentionSpec
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.attention import attend, supports
from passes.attention.expression import Apply, Expression, Index, Leaf
from passes.masks import Read, causal
from passes.scores import Biased

pytestmark = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))

B, T, S, N, K, H = 2, 21, 90, 4, 2, 16


def leaf(*roles) -> Leaf:
    return Leaf(0, roles, "float32")


def by_distance() -> Expression:
    """Key position less query position, as floats, times a number of the head."""

    def as_float(role) -> Expression:
        params = (("new_dtype", np.dtype("float32")), ("sharding", None), ("weak_type", False))
        return Apply(lax.convert_element_type_p, params, (Index(role, "int32"),))

    distance = Apply(lax.sub_p, (), (as_float("s"), as_float("t")))
    return Apply(lax.mul_p, (), (distance, leaf("n")))


BIASES = {
    "head and key": (Biased(leaf("n", "s"), (Read(0, "head_key"),)), (1, N, S)),
    "all three": (Biased(leaf("t", "n", "s"), (Read(0, "head_pair"),)), (B, T, N, S)),
    "request": (Biased(leaf(), (Read(0, "request"),)), (B,)),
    "query": (Biased(leaf("t"), (Read(0, "query"),)), (B, T)),
    "distance": (Biased(by_distance(), (Read(0, "head"),)), (1, N)),
}


def inputs(rows: int, shape):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(x).astype(np.float32) for x in ((B, rows, N, H), (B, S, K, H), (B, S, K, H))]
    return [*map(jnp.asarray, arrays), [jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)]]


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_those_of_the_reference(name):
    score, shape = BIASES[name]
    spec = AttentionSpec(H**-0.5, causal(), score=score)
    given = inputs(T, shape)
    out, lse = jax.jit(functools.partial(attend, spec))(*given)
    want, want_lse = jax.jit(functools.partial(reference.attend, spec))(*given)
    np.testing.assert_allclose(out, want, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=5e-6)
    bare, _ = jax.jit(functools.partial(reference.attend, AttentionSpec(H**-0.5, causal())))(*given[:3])
    assert name in ("request", "query") or np.abs(np.asarray(bare) - want).max() > 1e-2


def test_gradients_come_from_the_blocked_backward():
    score, shape = BIASES["head and key"]
    spec = AttentionSpec(H**-0.5, causal(), score=score)
    given = inputs(T, shape)

    def gradients(implementation):
        def loss(*arrays):
            return (attention(spec, *arrays, implementation=implementation)[0] ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)

    for got, want in zip(jax.tree.leaves(gradients("cpu")), jax.tree.leaves(gradients("xla_blocked")), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        assert np.abs(want).max() > 1e-3


def test_a_bias_that_takes_much_memory_is_declined():
    spec = AttentionSpec(1.0, score=BIASES["all three"][0])
    query, key = (jax.ShapeDtypeStruct((4, n, 8, 16), jnp.float32) for n in (1024, 4096))
    assert "the bias takes up to 536870912 bytes" in str(supports(spec, query, key, key))
