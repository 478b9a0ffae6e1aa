"""Qwen3 (arXiv:2505.09388) as an ordinary training forward: Llama with RMSNorms on the heads of queries and keys.

Knows no cache, no serving and no checkpoint format. The one idea: norms before the rotation bound the scores.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormBlock, rotation_of
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Shape of a Qwen3; `attention_bias` is one switch for all four projections."""

    attention_bias: bool = False


class Qwen3(nnx.Module):
    """A decoder-only transformer with QK-norm: tokens to next-token logits."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                PreNormBlock(
                    config,
                    bias=config.attention_bias,
                    output_bias=config.attention_bias,
                    has_head_norms=True,
                    rngs=rngs,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        rotation = rotation_of(self.config, tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return unembed(self.norm(x), self.embed, self.head)
