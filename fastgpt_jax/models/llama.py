"""Llama (arXiv:2302.13971) as an ordinary training forward; Qwen2 is the same with biases on queries, keys and values.

Knows no cache, no serving and no checkpoint format. The one idea: this is what one writes to train the model, and
nothing in it is there for the compiler.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormBlock, rotation_of
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape of a Llama.

    `attention_bias` is for queries, keys and values, `attention_output_bias` for the projection after them (Qwen2 has
    the first alone).
    """

    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False


class Llama(nnx.Module):
    """A decoder-only transformer: tokens to next-token logits."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        block = partial(
            PreNormBlock,
            config,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            mlp_bias=config.mlp_bias,
        )
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([block(rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        rotation = rotation_of(self.config, tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return unembed(self.norm(x), self.embed, self.head)
