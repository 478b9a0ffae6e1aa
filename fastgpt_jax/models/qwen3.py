"""Qwen3 (arXiv:2505.09388) as an ordinary training forward: Llama with RMSNorms on the heads of queries and keys.

Knows no cache, no serving and no checkpoint format. The one idea: norms before the rotation bound the scores.
"""

from dataclasses import dataclass

from flax import nnx

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormDecoder


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Shape of a Qwen3; `attention_bias` is one switch for all four projections."""

    attention_bias: bool = False


class Qwen3(PreNormDecoder):
    """A decoder-only transformer with QK-norm: tokens to next-token logits."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        bias = config.attention_bias
        super().__init__(config, bias=bias, output_bias=bias, has_head_norms=True, rngs=rngs)
