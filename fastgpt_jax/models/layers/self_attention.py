"""Multi-head self-attention with its projections: one module for all families whose projections are apart.

Knows no configuration of a family. The one idea: what families differ in (biases, norms of queries and keys, rotations,
windows, caps) is an argument, and None or False leaves it out of the forward altogether.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastgpt_jax.models.layers.attention import causal_attention
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.rope import Rotation, apply_rope


class SelfAttention(nnx.Module):
    """Grouped-query self-attention, position `t` over positions `s <= t`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        head_norm: partial[RMSNorm] | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Makes the projections.

        Args:
          bias: Whether queries, keys and values have biases; `output_bias` is for the projection after them.
          head_norm: Makes the norms of queries and of keys, over the dimensions of a head, before the rotation.
          scale: The scores' factor, None for `1 / sqrt(head_dim)`; `window` and `softcap` as in `causal_attention`.
        """
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.query = linear(width, num_heads * head_dim, use_bias=bias)
        self.key = linear(width, num_kv_heads * head_dim, use_bias=bias)
        self.value = linear(width, num_kv_heads * head_dim, use_bias=bias)
        self.output = linear(num_heads * head_dim, width, use_bias=output_bias)
        if head_norm is not None:
            self.query_norm, self.key_norm = head_norm(head_dim), head_norm(head_dim)
        self.has_head_norms = head_norm is not None
        self.head_dim = head_dim
        self.scale, self.window, self.softcap = scale, window, softcap

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation | None = None) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        query, key, value = (layer(x).reshape(B, T, -1, self.head_dim) for layer in (self.query, self.key, self.value))
        if self.has_head_norms:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = apply_rope(query, *rotation), apply_rope(key, *rotation)
        mixed = causal_attention(query, key, value, scale=self.scale, window=self.window, softcap=self.softcap)
        return self.output(mixed.reshape(B, T, -1))
