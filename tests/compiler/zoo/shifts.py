"""Token shifts and causal convolutions: a window of a few past tokens, in all its spellings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from .blocks import VOCAB, WIDTH, Draw, Params, attention_weights, causal_attention, decoder
from .model import ZooModel

TAPS = 4


def by_pad(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def by_pad_of_slice(x: Array) -> Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))


def by_concatenate(x: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def by_roll(x: Array) -> Array:
    """Rolls, then clears the row that came around from the end."""
    return jnp.where((jnp.arange(x.shape[1]) == 0)[:, None], 0.0, jnp.roll(x, 1, axis=1))


def by_two(x: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(x[:, :2]), x[:, :-2]], axis=1)


def by_update(x: Array) -> Array:
    """Writes all but the last row into zeros, one row down."""
    return jnp.zeros_like(x).at[:, 1:].set(x[:, :-1])


def by_gather(x: Array) -> Array:
    """Gathers the row before; the first row gathers itself."""
    return x[:, jnp.maximum(jnp.arange(x.shape[1]) - 1, 0)]


def repeating_first(x: Array) -> Array:
    """The first token is its own past."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def shifted_attention(p: Params, x: Array, tokens: Array, *, shift: Callable[[Array], Array]) -> Array:
    """Attention over a learned mix of each token and its past, as RWKV's channels do."""
    mix = jax.nn.sigmoid(p["mix"])
    return causal_attention(p, x * mix + shift(x) * (1 - mix), tokens)


def shift_only(p: Params, x: Array, tokens: Array) -> Array:
    """No attention at all: each token meets the one before."""
    return jnp.tanh(by_pad(x) @ p["past"]) * (x @ p["now"])


def difference(p: Params, x: Array, tokens: Array) -> Array:
    """First differences of the values, with the first value itself in front."""
    return causal_attention(p, jnp.concatenate([x[:, :1], x[:, 1:] - x[:, :-1]], axis=1), tokens)


def depthwise(x: Array, kernel: Array, padding: tuple[int, int], dilation: int = 1) -> Array:
    """Depthwise convolution over time; kernel [taps, 1, D]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[padding],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=WIDTH,
    )


def conv_padding(x: Array, kernel: Array) -> Array:
    return depthwise(x, kernel, (TAPS - 1, 0))


def conv_padded_before(x: Array, kernel: Array) -> Array:
    return depthwise(jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0))), kernel, (0, 0))


def conv_cut_after(x: Array, kernel: Array) -> Array:
    """Padded on both sides, as PyTorch's Mamba has it, and cut back to the length."""
    return depthwise(x, kernel, (TAPS - 1, TAPS - 1))[:, : x.shape[1]]


def conv_dilated(x: Array, kernel: Array) -> Array:
    return depthwise(x, kernel, (2 * (TAPS - 1), 0), dilation=2)


def conv_channels_first(x: Array, kernel: Array) -> Array:
    """Time as the last axis."""
    return lax.conv_general_dilated(
        x.swapaxes(1, 2), kernel.transpose(2, 1, 0), (1,), [(TAPS - 1, 0)], feature_group_count=WIDTH
    ).swapaxes(1, 2)


def conv_by_taps(x: Array, kernel: Array) -> Array:
    """The sum of shifted slices, each times its tap."""
    padded = jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0)))
    return sum(padded[:, i : i + x.shape[1]] * kernel[i] for i in range(TAPS))


def conv_by_stacked_taps(x: Array, kernel: Array) -> Array:
    """Shifted copies stacked, then contracted with the taps."""
    padded = jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0)))
    stacked = jnp.stack([padded[:, i : i + x.shape[1]] for i in range(TAPS)], axis=2)
    return jnp.einsum("btkd,kd->btd", stacked, kernel[:, 0])


def convolved_attention(p: Params, x: Array, tokens: Array, *, conv: Callable[[Array, Array], Array]) -> Array:
    """A short depthwise convolution before attention."""
    return causal_attention(p, jax.nn.silu(conv(x, p["kernel"])), tokens)


def dense_conv(p: Params, x: Array, tokens: Array) -> Array:
    """Every channel reads every channel of the last three tokens; no attention."""
    y = lax.conv_general_dilated(x, p["dense"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.tanh(y)


def shift_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "mix": draw(WIDTH)}


def shift_only_weights(draw: Draw) -> Params:
    return {"past": draw(WIDTH, WIDTH), "now": draw(WIDTH, WIDTH)}


def conv_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "kernel": draw(TAPS, 1, WIDTH)}


def dense_conv_weights(draw: Draw) -> Params:
    return {"dense": draw(3, WIDTH, WIDTH, scale=(3 * WIDTH) ** -0.5)}


def embed_pairs(params: Params, tokens: Array) -> Array:
    """Adds an embedding of the hashed pair of this token and the last: a shift of integers."""
    last = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return params["embed"][tokens] + params["pairs"][(tokens * VOCAB + last) % 61]


def pair_table(draw: Draw) -> Params:
    return {"pairs": draw(61, WIDTH, scale=1.0)}


def _shifted(name: str, shift, optional: bool = False) -> ZooModel:
    mix = partial(shifted_attention, shift=shift)
    return ZooModel(f"shift_{name}", lambda: decoder(mix, shift_weights), optional=optional)


def _convolved(name: str, conv) -> ZooModel:
    return ZooModel(f"conv_{name}", lambda: decoder(partial(convolved_attention, conv=conv), conv_weights))


MODELS = (
    _shifted("pad", by_pad),
    _shifted("pad_of_slice", by_pad_of_slice),
    _shifted("concatenate", by_concatenate),
    _shifted("roll", by_roll),
    _shifted("two", by_two),
    _shifted("update", by_update, optional=True),
    _shifted("gather", by_gather, optional=True),
    _shifted("repeating_first", repeating_first),
    ZooModel("shift_only", lambda: decoder(shift_only, shift_only_weights)),
    ZooModel("difference", lambda: decoder(difference)),
    ZooModel("embedded_pairs", lambda: decoder(causal_attention, embed=embed_pairs, extra=pair_table)),
    _convolved("padding", conv_padding),
    _convolved("padded_before", conv_padded_before),
    _convolved("cut_after", conv_cut_after),
    _convolved("dilated", conv_dilated),
    _convolved("channels_first", conv_channels_first),
    _convolved("by_taps", conv_by_taps),
    _convolved("by_stacked_taps", conv_by_stacked_taps),
    ZooModel("conv_dense", lambda: decoder(dense_conv, dense_conv_weights)),
)
