"""Normalisations over the last axis, computed in float32 whatever the dtype of the activations.

They know nothing of what surrounds them. The one idea: statistics in float32, the result in the input's dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` (arXiv:1910.07467); Gemma keeps weights around 0, offset 1."""

    def __init__(self, width: int, eps: float, *, offset: float = 0.0, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.full(width, 1.0 - offset, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        weight = _align(self.weight[...], x)
        return (normed * (weight + self.offset if self.offset else weight)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        # Two passes: E[x^2] - E[x]^2 cancels where the mean is large beside the spread, as in GPT-2's residual stream.
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        return (normed * _align(self.weight[...], x) + _align(self.bias[...], x)).astype(x.dtype)


def _align(weight: Float[Array, " D"], x: Float[Array, "*B D"]) -> Float[Array, "*ones D"]:
    """The weight in float32 with size-1 axes before it, so that no rank is promoted silently."""
    return jnp.reshape(weight.astype(jnp.float32), (1,) * (x.ndim - 1) + (-1,))
