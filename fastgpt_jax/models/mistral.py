"""Mistral (arXiv:2310.06825) as an ordinary training forward: Llama whose queries see a sliding window of positions.

Knows no cache, no serving and no checkpoint format. The one idea: the window is a second line in the mask.
"""

from dataclasses import dataclass

from flax import nnx

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormDecoder


@dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """Shape of a Mistral; `sliding_window` counts the positions a query sees, its own included, None for all."""

    sliding_window: int | None = None


class Mistral(PreNormDecoder):
    """A decoder-only transformer with windowed attention: tokens to next-token logits."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs):
        super().__init__(config, window=config.sliding_window, rngs=rngs)
