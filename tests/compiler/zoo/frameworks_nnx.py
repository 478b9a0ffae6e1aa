"""Flax NNX models: `nnx.split` gives the state, `nnx.merge` brings the module back inside the forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .blocks import HEADS, LAYERS, MAX, VOCAB, WIDTH
from .model import Forward, ZooModel
from .quick import quick_jit


class NnxBlock(nnx.Module):
    """Pre-norm attention, a gated MLP and dropout, which keeps an RNG stream in the state."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)])
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + self.attention(self.norms[0](x), mask=mask, deterministic=True)
        value, gate = jnp.split(self.up(self.norms[1](x)), 2, axis=-1)
        return x + self.dropout(self.down(value * nnx.silu(gate)))


class NnxDecoder(nnx.Module):
    """Blocks in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.3 * jax.random.normal(rngs.params(), (MAX, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class NnxScannedDecoder(nnx.Module):
    """Blocks stacked by `nnx.vmap`, run by `nnx.scan`, rematerialized on the way."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)(rngs.split(LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        mask = nnx.make_causal_mask(tokens)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x: Array, block: NnxBlock) -> Array:
            return block(x, mask)

        return self.tokens.attend(self.norm(run(self.tokens(tokens), self.blocks)))


def nnx_decoder(module_class: type[nnx.Module]) -> tuple[Forward, nnx.State]:
    """The module as a function of its state."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: module_class(nnx.Rngs(0))))
    state = quick_jit(lambda: nnx.state(module_class(nnx.Rngs(0))))()
    return lambda state, tokens: nnx.merge(graphdef, state)(tokens), state


MODELS = (
    ZooModel("nnx", lambda: nnx_decoder(NnxDecoder)),
    ZooModel("nnx_scan_remat", lambda: nnx_decoder(NnxScannedDecoder)),
)
