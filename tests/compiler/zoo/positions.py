"""Positions in every spelling: tables, sines, rotations, relative biases, counts over padding, arguments."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .blocks import (
    HEAD_DIM,
    HEADS,
    MAX,
    WIDTH,
    Draw,
    Params,
    attend,
    attention_weights,
    causal_attention,
    causal_mask,
    combine,
    decoder,
    decoder_params,
    heads,
    mlp,
    rms_norm,
    scores,
    softmax,
)
from .model import Forward, ZooModel


def angles(positions: Array, size: int, base: float = 100.0) -> Array:
    """Rotation angles [..., size / 2] of a head of `size` (arXiv:2104.09864)."""
    return positions[..., None] * base ** -(jnp.arange(0, size, 2) / size)


def rotate_half(x: Array, positions: Array) -> Array:
    """Rotary embedding that pairs the two halves of a head; x [B, T, N, H], positions [T] or [B, T]."""
    angle = angles(positions, x.shape[-1])[..., None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def rotate_interleaved(x: Array, positions: Array) -> Array:
    """Rotary embedding that pairs neighbours."""
    angle = angles(positions, x.shape[-1])[..., None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    pairs = [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)]
    return jnp.stack(pairs, axis=-1).reshape(x.shape)


def rotate_complex(x: Array, positions: Array) -> Array:
    """Rotary embedding as a product of complex numbers, the way Llama was first published."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.exp(1j * angles(positions, x.shape[-1]))[..., None, :]
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rotate_from_numpy_table(x: Array, positions: Array) -> Array:
    """Cosines and sines computed once at trace time, up to the context's end, and looked up."""
    angle = np.arange(MAX)[:, None] * 100.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = np.concatenate([angle, angle], axis=-1).astype(np.float32)
    cos, sin = jnp.asarray(np.cos(angle))[positions][:, None], jnp.asarray(np.sin(angle))[positions][:, None]
    swapped = jnp.concatenate([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], axis=-1)
    return x * cos + swapped * sin


def rotary(p: Params, x: Array, tokens: Array, *, rotate=rotate_half) -> Array:
    """Causal attention over rotated queries and keys."""
    q, k, v = heads(p, x)
    positions = jnp.arange(tokens.shape[1])
    return combine(p, softmax(scores(rotate(q, positions), rotate(k, positions)), causal_mask(tokens.shape[1])), v)


def partial_rotary(p: Params, x: Array, tokens: Array) -> Array:
    """Half of each head rotated, half left alone, as in GPT-NeoX."""
    q, k, v = heads(p, x)
    positions, half = jnp.arange(tokens.shape[1]), HEAD_DIM // 2
    q, k = (jnp.concatenate([rotate_half(y[..., :half], positions), y[..., half:]], axis=-1) for y in (q, k))
    return combine(p, softmax(scores(q, k), causal_mask(tokens.shape[1])), v)


def position_table(draw: Draw) -> Params:
    return {"positions": draw(MAX, WIDTH, scale=1.0)}


def embed_by_arange(params: Params, tokens: Array) -> Array:
    return params["embed"][tokens] + params["positions"][jnp.arange(tokens.shape[1])]


def embed_by_slice(params: Params, tokens: Array) -> Array:
    return params["embed"][tokens] + params["positions"][: tokens.shape[1]]


def embed_by_dynamic_slice(params: Params, tokens: Array) -> Array:
    return params["embed"][tokens] + lax.dynamic_slice_in_dim(params["positions"], 0, tokens.shape[1])


def embed_by_offset_table(params: Params, tokens: Array) -> Array:
    """OPT's table: the first two rows belong to no position."""
    return params["embed"][tokens] + params["positions"][2 : tokens.shape[1] + 2]


def embed_by_take(params: Params, tokens: Array) -> Array:
    """Positions with a batch axis, looked up by `take`."""
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length)[None], (batch, 1))
    return jnp.take(params["embed"], tokens, axis=0) + jnp.take(params["positions"], positions, axis=0)


def embed_by_padding_count(params: Params, tokens: Array) -> Array:
    """Positions count the tokens that are not padding."""
    count = jnp.cumsum((tokens != 0).astype(jnp.int32), axis=-1)
    return params["embed"][tokens] + params["positions"][jnp.maximum(count - 1, 0)]


def embed_by_sines(params: Params, tokens: Array) -> Array:
    """Sines and cosines computed in the forward."""
    angle = jnp.arange(tokens.shape[1])[:, None] / 100.0 ** (jnp.arange(0, WIDTH, 2) / WIDTH)
    return params["embed"][tokens] + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def embed_by_numpy_sines(params: Params, tokens: Array) -> Array:
    """The same as a constant of the trace."""
    angle = np.arange(tokens.shape[1])[:, None] / 100.0 ** (np.arange(0, WIDTH, 2) / WIDTH)
    return params["embed"][tokens] + np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def buckets_of(distance: Array, count: int) -> Array:
    """T5's buckets for distances into the past: exact ones first, then logarithmic (arXiv:1910.10683)."""
    exact = count // 2
    far = exact + jnp.log(jnp.maximum(distance, 1) / exact) / np.log(MAX / exact) * (count - exact)
    return jnp.where(distance < exact, distance, jnp.minimum(far.astype(jnp.int32), count - 1))


def bucketed_bias(p: Params, x: Array, tokens: Array) -> Array:
    """A learned score per head and bucket of distance."""
    q, k, v = heads(p, x)
    positions = jnp.arange(tokens.shape[1])
    bucket = buckets_of(jnp.maximum(positions[:, None] - positions, 0), count=8)
    return combine(p, softmax(scores(q, k) + p["bias"][bucket].transpose(2, 0, 1), causal_mask(len(positions))), v)


def relative_keys(p: Params, x: Array, tokens: Array) -> Array:
    """A learned vector per distance is added to the key (arXiv:1803.02155), gathered as [T, S, H]."""
    q, k, v = heads(p, x)
    positions = jnp.arange(tokens.shape[1])
    vectors = p["relative"][jnp.clip(positions[:, None] - positions, 0, 7)]
    s = scores(q, k) + jnp.einsum("btnh,tsh->bnts", q, vectors)
    return combine(p, softmax(s, causal_mask(len(positions))), v)


def relative_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "bias": draw(8, HEADS, scale=1.0), "relative": draw(8, HEAD_DIM, scale=1.0)}


def sharper_with_position(p: Params, x: Array, tokens: Array) -> Array:
    """Queries scaled by the logarithm of their own position: causal, unlike a scaling by the length."""
    q, k, v = heads(p, x)
    sharpness = 1.0 + jnp.log1p(jnp.arange(tokens.shape[1], dtype=jnp.float32))
    return combine(p, softmax(scores(q * sharpness[:, None, None], k), causal_mask(tokens.shape[1])), v)


def positions_argument() -> tuple[Forward, Params]:
    """Rotary angles and the causal mask both come from an argument."""

    def fn(params: Params, tokens: Array, positions: Array) -> Array:
        x = params["embed"][tokens]
        mask = (positions[:, :, None] >= positions[:, None, :])[:, None]
        for p in params["layers"]:
            q, k, v = heads(p, rms_norm(x))
            x = x + combine(p, softmax(scores(rotate_half(q, positions), rotate_half(k, positions)), mask), v)
            x = x + mlp(p, rms_norm(x))
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, None, seed=0)


def optional_positions_argument() -> tuple[Forward, Params]:
    """The argument may be left out; then positions are counted from zero."""

    def fn(params: Params, tokens: Array, positions: Array | None = None) -> Array:
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        x = params["embed"][tokens] + params["positions"][positions]
        for p in params["layers"]:
            x = x + causal_attention(p, rms_norm(x), tokens)
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, position_table, seed=0)


def attention_mask_argument() -> tuple[Forward, Params]:
    """Keys that an argument calls padding are hidden, and positions skip them; a token always sees itself."""

    def fn(params: Params, tokens: Array, attention_mask: Array) -> Array:
        length = tokens.shape[1]
        positions = jnp.clip(jnp.cumsum(attention_mask, axis=-1) - 1, 0, MAX - 1)
        x = params["embed"][tokens] + params["positions"][positions]
        visible = (attention_mask[:, None, :] > 0) | jnp.eye(length, dtype=bool)
        for p in params["layers"]:
            x = x + attend(p, rms_norm(x), (visible & causal_mask(length))[:, None])
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, position_table, seed=0)


def segment_ids_argument() -> tuple[Forward, Params]:
    """Packed documents: a token sees its own document alone."""

    def fn(params: Params, tokens: Array, segment_ids: Array) -> Array:
        x = params["embed"][tokens]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        for p in params["layers"]:
            x = x + attend(p, rms_norm(x), (same & causal_mask(tokens.shape[1]))[:, None])
            x = x + mlp(p, rms_norm(x))
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, None, seed=0)


def all_arguments() -> tuple[Forward, Params]:
    """All three arguments at once, out of order and by name only."""

    def fn(params: Params, tokens: Array, *, segment_ids: Array, positions: Array, attention_mask: Array) -> Array:
        x = params["embed"][tokens] + params["positions"][positions]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = (attention_mask[:, None, :] > 0) | jnp.eye(tokens.shape[1], dtype=bool)
        mask = same & visible & (positions[:, :, None] >= positions[:, None, :])
        for p in params["layers"]:
            x = x + attend(p, rms_norm(x), mask[:, None])
        return jax.nn.log_softmax(rms_norm(x) @ params["unembed"])

    return fn, decoder_params(attention_weights, position_table, seed=0)


def _embedded(name: str, embed) -> ZooModel:
    return ZooModel(name, lambda: decoder(causal_attention, embed=embed, extra=position_table))


def _rotated(name: str, rotate) -> ZooModel:
    return ZooModel(name, lambda: decoder(partial(rotary, rotate=rotate)))


MODELS = (
    _embedded("table_by_arange", embed_by_arange),
    _embedded("table_by_slice", embed_by_slice),
    _embedded("table_by_dynamic_slice", embed_by_dynamic_slice),
    _embedded("table_with_offset", embed_by_offset_table),
    _embedded("table_by_take", embed_by_take),
    _embedded("positions_from_padding", embed_by_padding_count),
    ZooModel("sines", lambda: decoder(causal_attention, embed=embed_by_sines)),
    ZooModel("sines_numpy", lambda: decoder(causal_attention, embed=embed_by_numpy_sines)),
    _rotated("rope_half", rotate_half),
    _rotated("rope_interleaved", rotate_interleaved),
    _rotated("rope_complex", rotate_complex),
    _rotated("rope_numpy_table", rotate_from_numpy_table),
    ZooModel("rope_partial", lambda: decoder(partial_rotary)),
    ZooModel("bucketed_bias", lambda: decoder(bucketed_bias, relative_weights)),
    ZooModel("relative_keys", lambda: decoder(relative_keys, relative_weights)),
    ZooModel("sharper_with_position", lambda: decoder(sharper_with_position)),
    ZooModel("positions_argument", positions_argument, arguments=("positions",)),
    ZooModel("optional_positions_argument", optional_positions_argument, arguments=("positions",)),
    ZooModel("attention_mask_argument", attention_mask_argument, arguments=("attention_mask",)),
    ZooModel("segment_ids_argument", segment_ids_argument, arguments=("segment_ids",)),
    ZooModel("all_arguments", all_arguments, arguments=("positions", "attention_mask", "segment_ids")),
)
