"""Mistral (arXiv:2310.06825) as an ordinary training forward: Llama whose queries see a sliding window of positions.

Knows no cache, no serving and no checkpoint format. The one idea: the window is a second line in the mask.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormBlock, rotation_of
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """Shape of a Mistral; `sliding_window` counts the positions a query sees, its own included, None for all."""

    sliding_window: int | None = None


class Mistral(nnx.Module):
    """A decoder-only transformer with windowed attention: tokens to next-token logits."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs):
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
