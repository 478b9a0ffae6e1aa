"""Flax linen models, written the way its documentation writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from .blocks import HEADS, LAYERS, MAX, VOCAB, WIDTH
from .model import Forward, ZooModel
from .quick import quick_jit


class LinenBlock(nn.Module):
    """Pre-norm attention and MLP."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, deterministic=True)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1, deterministic=True)(nn.Dense(WIDTH)(y))


class LinenScannedBlock(nn.Module):
    """`LinenBlock` in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        return LinenBlock()(x, mask), None


class LinenConvBlock(nn.Module):
    """A causal convolution, then a GRU by `nn.RNN`."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + nn.Conv(WIDTH, kernel_size=(3,), padding="CAUSAL")(nn.LayerNorm()(x))
        return x + nn.RNN(nn.GRUCell(WIDTH))(nn.RMSNorm()(x))


class LinenDecoder(nn.Module):
    """A small GPT; `layers` says how its blocks are laid out, `hide_padding` what the mask adds to causality."""

    layers: str = "loop"
    hide_padding: bool = False

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        table = nn.Embed(VOCAB, WIDTH, name="tokens")
        x = table(tokens) + nn.Embed(MAX, WIDTH, name="positions")(jnp.arange(tokens.shape[1])[None])
        mask = nn.make_causal_mask(tokens)
        if self.hide_padding:
            mask = nn.combine_masks(mask, nn.make_attention_mask(jnp.ones_like(tokens), tokens > 0))
        if self.layers.startswith("scan"):
            block = nn.remat(LinenScannedBlock, prevent_cse=False) if "remat" in self.layers else LinenScannedBlock
            axes = {"params": 0}
            stack = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS)
            x, _ = stack()(x, mask)
        else:
            block = {"loop": LinenBlock, "remat": nn.remat(LinenBlock), "conv": LinenConvBlock}[self.layers]
            for i in range(LAYERS):
                x = block(name=f"block_{i}")(x, mask)
        return table.attend(nn.LayerNorm()(x))


def linen_decoder(**options) -> tuple[Forward, dict]:
    """The model as `module.apply` and its variables."""
    module = LinenDecoder(**options)
    return module.apply, quick_jit(module.init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))


MODELS = (
    ZooModel("linen", linen_decoder),
    ZooModel("linen_remat", lambda: linen_decoder(layers="remat")),
    ZooModel("linen_scan", lambda: linen_decoder(layers="scan")),
    ZooModel("linen_scan_remat", lambda: linen_decoder(layers="scan_remat")),
    ZooModel("linen_conv_rnn", lambda: linen_decoder(layers="conv")),
    ZooModel(
        "linen_padding",
        lambda: linen_decoder(hide_padding=True),
        notes="Causal only while the first token is not padding, as `padding_after_text`.",
    ),
)
