"""Llama (arXiv:2302.13971) as an ordinary training forward; Qwen2 is the same with biases on queries, keys and values.

Knows no cache, no serving and no checkpoint format. The one idea: this and `layers/decoder.py` are what one writes to
train the model, and nothing in them is there for the compiler.
"""

from dataclasses import dataclass

from flax import nnx

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormDecoder


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape of a Llama.

    `attention_bias` is for queries, keys and values, `attention_output_bias` for the projection after them (Qwen2 has
    the first alone).
    """

    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False


class Llama(PreNormDecoder):
    """A decoder-only transformer: tokens to next-token logits."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            mlp_bias=config.mlp_bias,
            rngs=rngs,
        )
