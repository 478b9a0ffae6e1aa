"""Phi-3 (arXiv:2404.14219) as an ordinary training forward: Llama with a window and with heads rotated in part.

Knows no cache, no serving and no checkpoint format. The one idea: checkpoints fuse its projections, the forward does
not, so that each can be divided among devices by itself.
"""

from dataclasses import dataclass

from flax import nnx

from fastgpt_jax.models.layers.decoder import DecoderConfig, PreNormDecoder


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


class Phi3(PreNormDecoder):
    """A decoder-only transformer: tokens to next-token logits."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs):
        super().__init__(config, window=config.sliding_window, rngs=rngs)
