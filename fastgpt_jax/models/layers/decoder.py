"""What the rotary decoders (Llama and its kin) share: their shape, the block of two pre-norms, and the forward.

Knows no family, no cache and no serving: this is what one writes to train such a model. The one idea: a family is the
fields it adds to this shape and the arguments it gives this block.
"""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.mlp import GatedMLP
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.rope import RopeScaling, Rotation, make_frequencies, rope_table
from fastgpt_jax.models.layers.self_attention import SelfAttention
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(abc.ABC):
    """Shape of a rotary decoder; names and meanings are those of Hugging Face's config.json.

    Invariants: query heads are a multiple of KV heads; the rotated dimension of a head is even, and the scaling fits
    it. `dtype` is that of parameters and activations; norms, softmax, rotations and logits are float32 in any case.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"query heads must be a multiple of KV heads, got N={self.num_attention_heads} and "
                f"K={self.num_key_value_heads}; check num_attention_heads and num_key_value_heads"
            )
        if self.rotary_dim % 2:
            raise UserError(f"rotary embeddings need an even head_dim, got {self.rotary_dim}")
        make_frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling)  # refuses a scaling of another size

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.head_dim


def rotation_of(config: DecoderConfig, num_tokens: int) -> Rotation:
    """The rotations of positions 0 to `num_tokens - 1`."""
    return rope_table(jnp.arange(num_tokens), config.rotary_dim, config.rope_theta, config.rope_scaling)


class PreNormBlock(nnx.Module):
    """Attention and gated MLP, each behind an RMSNorm and beside the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        bias: bool = False,
        output_bias: bool = False,
        mlp_bias: bool = False,
        has_head_norms: bool = False,
        window: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Args: as in `SelfAttention` and `GatedMLP`; `has_head_norms` for RMSNorms of queries and keys."""
        dtype = jnp.dtype(config.dtype)
        norm = partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        self.attention_norm = norm(config.hidden_size)
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=bias,
            output_bias=output_bias,
            head_norm=norm if has_head_norms else None,
            window=window,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = norm(config.hidden_size)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            use_bias=mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class PreNormDecoder(nnx.Module):
    """A decoder-only transformer of `PreNormBlock`s: tokens to next-token logits. The base of a family's module."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, **block_options: Any):
        """Args: block_options: Of every `PreNormBlock`."""
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [PreNormBlock(config, **block_options, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        rotation = rotation_of(self.config, tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return unembed(self.norm(x), self.embed, self.head)
