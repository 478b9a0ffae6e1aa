"""Masks: how they are spelled, what they depend on, and which keys they leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .blocks import (
    HEADS,
    MASKED,
    MAX,
    WIDTH,
    Draw,
    Params,
    attend,
    attention_weights,
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

PREFIX = 5
SEPARATOR = 7


def distances(length: int) -> Array:
    """How far the key lies before the query, [T, T]."""
    return jnp.arange(length)[:, None] - jnp.arange(length)[None, :]


def by_tril(p: Params, x: Array, tokens: Array) -> Array:
    length = tokens.shape[1]
    return attend(p, x, jnp.tril(jnp.ones((1, 1, length, length), bool)))


def by_addition(p: Params, x: Array, tokens: Array) -> Array:
    """An upper triangle of large negatives is added to the scores."""
    q, k, v = heads(p, x)
    s = scores(q, k) + jnp.triu(jnp.full((tokens.shape[1], tokens.shape[1]), MASKED), k=1)
    return combine(p, jax.nn.softmax(s, axis=-1), v)


def by_buffer(p: Params, x: Array, tokens: Array) -> Array:
    """A square of the context's size, cut to the length, as in GPT-2's first code."""
    length = tokens.shape[1]
    return attend(p, x, jnp.tril(jnp.ones((MAX, MAX), bool))[None, None, :length, :length])


def by_parameter(p: Params, x: Array, tokens: Array) -> Array:
    """The same square kept among the parameters, as floats."""
    length = tokens.shape[1]
    return attend(p, x, p["causal"][:length, :length] > 0)


def buffer_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "causal": jnp.asarray(np.tril(np.ones((MAX, MAX), np.float32)))}


def by_numpy(p: Params, x: Array, tokens: Array) -> Array:
    return attend(p, x, np.tril(np.ones((tokens.shape[1], tokens.shape[1]), bool)))


def by_numpy_window(p: Params, x: Array, tokens: Array) -> Array:
    """A constant that depends on the distance alone (Toeplitz)."""
    ones = np.ones((tokens.shape[1], tokens.shape[1]), bool)
    return attend(p, x, np.tril(ones) & ~np.tril(ones, -6))


def by_odd_numpy(p: Params, x: Array, tokens: Array) -> Array:
    """A constant with no such structure: every third key, and oneself."""
    i = np.arange(tokens.shape[1])
    return attend(p, x, (i[:, None] >= i) & ((i % 3 == 0) | (i[:, None] == i)))


def by_random_numpy(p: Params, x: Array, tokens: Array) -> Array:
    """A random sparse pattern, drawn once at the context's size."""
    i, length = np.arange(MAX), tokens.shape[1]
    keep = (np.random.default_rng(3).random((MAX, MAX)) < 0.4) | (i[:, None] == i)
    return attend(p, x, (keep & (i[:, None] >= i))[:length, :length])


def sliding_window(p: Params, x: Array, tokens: Array) -> Array:
    distance = distances(tokens.shape[1])
    return attend(p, x, (distance >= 0) & (distance < 6))


def sliding_window_by_band(p: Params, x: Array, tokens: Array) -> Array:
    """A band cut from ones by two triangles."""
    ones = jnp.ones((tokens.shape[1], tokens.shape[1]))
    return attend(p, x, jnp.triu(jnp.tril(ones), k=-5) != 0)


def window_with_first_tokens(p: Params, x: Array, tokens: Array) -> Array:
    """A window, and the first two tokens always (arXiv:2309.17453)."""
    distance = distances(tokens.shape[1])
    return attend(p, x, (distance >= 0) & ((distance < 6) | (jnp.arange(tokens.shape[1]) < 2)))


def dilated(p: Params, x: Array, tokens: Array) -> Array:
    distance = distances(tokens.shape[1])
    return attend(p, x, (distance >= 0) & (distance % 3 == 0))


def earlier_blocks(p: Params, x: Array, tokens: Array) -> Array:
    """Oneself, and all of every earlier block of four: blocks in the mask only, not in the shapes."""
    i = jnp.arange(tokens.shape[1])
    return attend(p, x, (i[:, None] // 4 > i // 4) | (i[:, None] == i))


def strictly_earlier(p: Params, x: Array, tokens: Array) -> Array:
    """No token sees itself; the first, which sees nothing, gets zeros."""
    q, k, v = heads(p, x)
    mask = distances(tokens.shape[1]) > 0
    return combine(p, jnp.where(mask, softmax(scores(q, k), mask), 0.0), v)


def window_per_head(p: Params, x: Array, tokens: Array) -> Array:
    """Each head its own window."""
    distance = distances(tokens.shape[1])
    windows = jnp.array([2, 4, 8, MAX])[:, None, None]
    return attend(p, x, (distance >= 0) & (distance < windows))


def learned_span(p: Params, x: Array, tokens: Array) -> Array:
    """A soft window per head whose width is a parameter (arXiv:1905.07799)."""
    q, k, v = heads(p, x)
    distance = distances(tokens.shape[1])
    soft = jnp.clip((p["span"][:, None, None] - distance) / 4.0 + 1.0, 0.0, 1.0)
    weights = softmax(scores(q, k), distance >= 0) * soft
    return combine(p, weights / (weights.sum(axis=-1, keepdims=True) + 1e-6), v)


def span_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "span": jnp.array([1.0, 3.0, 5.0, 9.0])}


def local_and_global(p: Params, x: Array, tokens: Array) -> Array:
    """A gate of the query's token mixes a local and a global map of the same scores."""
    q, k, v = heads(p, x)
    distance, s = distances(tokens.shape[1]), scores(q, k)
    gate = jax.nn.sigmoid(x @ p["gate"]).swapaxes(1, 2)[..., None]
    local, everywhere = softmax(s, (distance >= 0) & (distance < 4)), softmax(s, distance >= 0)
    return combine(p, gate * local + (1 - gate) * everywhere, v)


def gate_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "gate": draw(WIDTH, HEADS), "switch": draw()}


def gated_by_layer(p: Params, x: Array, tokens: Array) -> Array:
    """Both attentions in full, and a learned scalar that weighs them."""
    distance, gate = distances(tokens.shape[1]), jax.nn.sigmoid(p["switch"])
    return gate * attend(p, x, (distance >= 0) & (distance < 4)) + (1 - gate) * attend(p, x, distance >= 0)


def mask_per_layer() -> tuple[Forward, Params]:
    """Local and global layers in turn."""

    def fn(params: Params, tokens: Array) -> Array:
        x, distance = params["embed"][tokens], distances(tokens.shape[1])
        for i, p in enumerate(params["layers"]):
            mask = distance >= 0 if i % 2 else (distance >= 0) & (distance < 5)
            x = x + attend(p, rms_norm(x), mask)
            x = x + mlp(p, rms_norm(x))
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, None, seed=0)


def padding_hidden(p: Params, x: Array, tokens: Array) -> Array:
    """Padding (id 0) is no key, except to itself."""
    visible = (tokens != 0)[:, None, :] | jnp.eye(tokens.shape[1], dtype=bool)
    return attend(p, x, (visible & causal_mask(tokens.shape[1]))[:, None])


def padding_zeroed(p: Params, x: Array, tokens: Array) -> Array:
    """Exponentials of padding are zero, and a row of padding alone divides by a small number."""
    q, k, v = heads(p, x)
    mask = causal_mask(tokens.shape[1]) & (tokens != 0)[:, None, None, :]
    s = jnp.where(mask, scores(q, k), MASKED)
    e = jnp.where(mask, jnp.exp(s - jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))), 0.0)
    return combine(p, e / (e.sum(axis=-1, keepdims=True) + 1e-6), v)


def padding_after_text(p: Params, x: Array, tokens: Array) -> Array:
    """Padding is no key at all, as most code has it."""
    return attend(p, x, causal_mask(tokens.shape[1]) & (tokens != 0)[:, None, None, :])


def documents_from_tokens(p: Params, x: Array, tokens: Array) -> Array:
    """A separator token starts a new document; nothing looks back across it."""
    document = jnp.cumsum(tokens == SEPARATOR, axis=1)
    same = document[:, :, None] == document[:, None, :]
    return attend(p, x, (same & causal_mask(tokens.shape[1]))[:, None])


def tokens_decide(p: Params, x: Array, tokens: Array) -> Array:
    """Odd tokens see all earlier ones, even ones a window: the mask depends on the query's token."""
    distance = distances(tokens.shape[1])
    odd = (tokens % 2 == 1)[:, None, :, None]
    return attend(p, x, (distance >= 0) & (odd | (distance < 3)))


def prefix_lm(p: Params, x: Array, tokens: Array) -> Array:
    """The first five tokens see each other; all others look back only."""
    return attend(p, x, causal_mask(tokens.shape[1]) | (jnp.arange(tokens.shape[1]) < PREFIX))


def prefix_lm_by_update(p: Params, x: Array, tokens: Array) -> Array:
    """The same, by writing columns of true into a triangle of NumPy's."""
    mask = np.tril(np.ones((tokens.shape[1], tokens.shape[1]), bool))
    mask[:, :PREFIX] = True
    return attend(p, x, jnp.asarray(mask))


MODELS = (
    ZooModel("mask_by_tril", lambda: decoder(by_tril)),
    ZooModel("mask_by_addition", lambda: decoder(by_addition)),
    ZooModel("mask_by_buffer", lambda: decoder(by_buffer)),
    ZooModel("mask_by_parameter", lambda: decoder(by_parameter, buffer_weights)),
    ZooModel("mask_by_numpy", lambda: decoder(by_numpy)),
    ZooModel("mask_by_numpy_window", lambda: decoder(by_numpy_window)),
    ZooModel("mask_by_odd_numpy", lambda: decoder(by_odd_numpy)),
    ZooModel("mask_by_random_numpy", lambda: decoder(by_random_numpy)),
    ZooModel("sliding_window", lambda: decoder(sliding_window)),
    ZooModel("sliding_window_by_band", lambda: decoder(sliding_window_by_band)),
    ZooModel("window_with_first_tokens", lambda: decoder(window_with_first_tokens)),
    ZooModel("dilated_window", lambda: decoder(dilated)),
    ZooModel("earlier_blocks", lambda: decoder(earlier_blocks)),
    ZooModel("strictly_earlier", lambda: decoder(strictly_earlier)),
    ZooModel("window_per_head", lambda: decoder(window_per_head)),
    ZooModel("learned_span", lambda: decoder(learned_span, span_weights)),
    ZooModel("local_and_global", lambda: decoder(local_and_global, gate_weights)),
    ZooModel("gated_by_layer", lambda: decoder(gated_by_layer, gate_weights)),
    ZooModel("mask_per_layer", mask_per_layer),
    ZooModel("padding_hidden", lambda: decoder(padding_hidden)),
    ZooModel("padding_zeroed", lambda: decoder(padding_zeroed)),
    ZooModel(
        "padding_after_text",
        lambda: decoder(padding_after_text),
        notes="Causal only while the first token is not padding: a row that sees nothing averages over all columns.",
    ),
    ZooModel("documents_from_tokens", lambda: decoder(documents_from_tokens)),
    ZooModel("tokens_decide", lambda: decoder(tokens_decide)),
    ZooModel("prefix_lm", lambda: decoder(prefix_lm), first_chunk=PREFIX),
    ZooModel("prefix_lm_by_update", lambda: decoder(prefix_lm_by_update), first_chunk=PREFIX),
)
