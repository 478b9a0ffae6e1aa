"""Pieces that the zoo's bare-`jnp` models share: weights drawn with NumPy, attention in steps, a residual decoder.

Ordinary training code. Letters: B batch, T queries, S keys, D width, N heads, K key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

VOCAB, WIDTH, HEADS, HEAD_DIM, LAYERS, MAX = 31, 32, 4, 8, 2, 64
MASKED = -1e9

Params: TypeAlias = dict[str, Any]
Draw: TypeAlias = Callable[..., Array]
Mix: TypeAlias = Callable[[Params, Array, Array], Array]


def make_draw(seed: int) -> Draw:
    """Returns `draw(*shape, scale=None)`: normal float32, by default of scale 1 / sqrt(fan in)."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float | None = None) -> Array:
        if scale is None:
            scale = shape[0] ** -0.5 if len(shape) > 1 else 1.0
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return draw


def rms_norm(x: Array) -> Array:
    """Scales the last axis to mean square one."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def mlp(p: Params, x: Array) -> Array:
    """Two linear maps around a GELU."""
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


def mlp_weights(draw: Draw) -> Params:
    """Weights of `mlp`."""
    return {"up": draw(WIDTH, 2 * WIDTH), "down": draw(2 * WIDTH, WIDTH)}


def causal_mask(length: int) -> Array:
    """bool[T, T], true where the key is no later than the query."""
    return jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]


def attention_weights(draw: Draw, kv_heads: int = HEADS) -> Params:
    """Projections `q [D, N, H]`, `k` and `v [D, K, H]`, `o [N, H, D]`."""
    return {
        "q": draw(WIDTH, HEADS, HEAD_DIM),
        "k": draw(WIDTH, kv_heads, HEAD_DIM),
        "v": draw(WIDTH, kv_heads, HEAD_DIM),
        "o": draw(HEADS, HEAD_DIM, WIDTH, scale=WIDTH**-0.5),
    }


def project(x: Array, weight: Array) -> Array:
    """[B, T, D] to heads [B, T, N, H]."""
    return jnp.einsum("btd,dnh->btnh", x, weight)


def heads(p: Params, x: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values, each [B, T, heads, H]."""
    return project(x, p["q"]), project(x, p["k"]), project(x, p["v"])


def scores(q: Array, k: Array) -> Array:
    """Scaled dot products [B, N, T, S]."""
    return jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(HEAD_DIM)


def softmax(s: Array, mask: Array | np.ndarray) -> Array:
    """Probabilities over the last axis where `mask` allows."""
    return jax.nn.softmax(jnp.where(mask, s, MASKED), axis=-1)


def combine(p: Params, probs: Array, v: Array) -> Array:
    """Values [B, S, N, H] weighted by [B, N, T, S] and projected to [B, T, D]."""
    return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", probs, v), p["o"])


def attend(p: Params, x: Array, mask: Array | np.ndarray) -> Array:
    """Multi-head attention under any mask that broadcasts to [B, N, T, S]."""
    q, k, v = heads(p, x)
    return combine(p, softmax(scores(q, k), mask), v)


def causal_attention(p: Params, x: Array, tokens: Array) -> Array:
    """Plain causal multi-head attention."""
    return attend(p, x, causal_mask(tokens.shape[1]))


def embed_tokens(params: Params, tokens: Array) -> Array:
    """Looks tokens up; no positions."""
    return params["embed"][tokens]


def decoder_params(weights: Callable[[Draw], Params], extra: Callable[[Draw], Params] | None, seed: int) -> Params:
    """Embeddings, `LAYERS` layers of the mixing's and the MLP's weights, and what `extra` adds at the top."""
    draw = make_draw(seed)
    params: Params = {"embed": draw(VOCAB, WIDTH, scale=1.0), "unembed": draw(WIDTH, VOCAB)}
    params["layers"] = [{**weights(draw), **mlp_weights(draw)} for _ in range(LAYERS)]
    return {**params, **extra(draw)} if extra else params


def decoder(
    mix: Mix,
    weights: Callable[[Draw], Params] = attention_weights,
    *,
    embed: Callable[[Params, Array], Array] = embed_tokens,
    extra: Callable[[Draw], Params] | None = None,
    seed: int = 0,
) -> tuple[Callable[[Params, Array], Array], Params]:
    """A pre-norm residual decoder around a way to mix tokens, `mix(layer, x [B, T, D], tokens) -> [B, T, D]`."""

    def fn(params: Params, tokens: Array) -> Array:
        x = embed(params, tokens)
        for layer in params["layers"]:
            x = x + mix(layer, rms_norm(x), tokens)
            x = x + mlp(layer, rms_norm(x))
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(weights, extra, seed)


def stack_layers(layers: list[Params]) -> Params:
    """One pytree with a leading layer axis, as `lax.scan` over layers wants it."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
