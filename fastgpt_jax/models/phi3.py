"""Phi-3 (arXiv:2404.14219) as an ordinary training forward: Llama with a window and with heads rotated in part.

Knows no cache, no serving and no checkpoint format. The one idea: checkpoints fuse its projections, the forward does
not, so that each can be divided among devices by itself.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormBlock, rotation_of
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """Shape of a Phi-3.

    `sliding_window` counts the positions a query sees, its own included, None for all; `partial_rotary_factor` is the
    share of a head that is rotated, from its first dimension on.
    """

    sliding_window: int | None = None
    partial_rotary_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


class Phi3(nnx.Module):
    """A decoder-only transformer: tokens to next-token logits."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [PreNormBlock(config, window=config.sliding_window, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        rotation = rotation_of(self.config, tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return unembed(self.norm(x), self.embed, self.head)
