"""Loops: scans over stacked layers, branches within them, maps over queries, online softmax over keys."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from .attention import latent_attention, latent_weights
from .blocks import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    Draw,
    Mix,
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
    project,
    rms_norm,
    scores,
    softmax,
    stack_layers,
)
from .model import Forward, ZooModel
from .recurrent import gru, square_weights
from .shifts import by_pad

Body = Callable[[Params, Array, Array], Array]
BLOCK = 8


def stacked(weights: Callable[[Draw], Params]) -> Params:
    """Parameters of a decoder whose layers are stacked."""
    params = decoder_params(weights, None, seed=0)
    return {**params, "layers": stack_layers(params["layers"])}


def scanned(mix: Mix, weights: Callable[[Draw], Params] = attention_weights) -> tuple[Forward, Params]:
    """A decoder that scans over its layers."""

    def fn(params: Params, tokens: Array) -> Array:
        def body(x: Array, p: Params) -> tuple[Array, None]:
            x = x + mix(p, rms_norm(x), tokens)
            return x + mlp(p, rms_norm(x)), None

        x, _ = lax.scan(body, params["embed"][tokens], params["layers"])
        return rms_norm(x) @ params["unembed"]

    return fn, stacked(weights)


@jax.checkpoint
def rematerialized(p: Params, x: Array, tokens: Array) -> Array:
    """Attention that hides padding, recomputed in the backward pass."""
    visible = (tokens != 0)[:, None, :] | jnp.eye(tokens.shape[1], dtype=bool)
    return attend(p, x, (visible & causal_mask(tokens.shape[1]))[:, None])


def recurrent_and_attention(p: Params, x: Array, tokens: Array) -> Array:
    """A GRU over time, a token shift and attention in one layer."""
    return gru(p, x, tokens) + causal_attention(p, by_pad(x), tokens)


def recurrent_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), **square_weights(draw)}


def scan_with_scores_carried() -> tuple[Forward, Params]:
    """Each layer adds its scores to the last layer's, as RealFormer does (arXiv:2012.11747)."""

    def fn(params: Params, tokens: Array) -> Array:
        batch, length = tokens.shape

        def body(carry: tuple[Array, Array], p: Params) -> tuple[tuple[Array, Array], None]:
            x, s = carry
            q, k, v = heads(p, rms_norm(x))
            s = s + scores(q, k)
            return (x + combine(p, softmax(s, causal_mask(length)), v), s), None

        start = (params["embed"][tokens], jnp.zeros((batch, HEADS, length, length)))
        (x, _), _ = lax.scan(body, start, params["layers"])
        return rms_norm(x) @ params["unembed"]

    return fn, stacked(attention_weights)


def scan_with_shared_keys() -> tuple[Forward, Params]:
    """All layers attend to keys computed once before the scan."""

    def fn(params: Params, tokens: Array) -> Array:
        x = params["embed"][tokens]
        _, k, v = heads(jax.tree.map(lambda a: a[0], params["layers"]), rms_norm(x))

        def body(x: Array, p: Params) -> tuple[Array, None]:
            s = scores(project(rms_norm(x), p["q"]), k)
            return x + combine(p, softmax(s, causal_mask(tokens.shape[1])), v), None

        x, _ = lax.scan(body, x, params["layers"])
        return rms_norm(x) @ params["unembed"]

    return fn, stacked(attention_weights)


def scan_collecting_layers() -> tuple[Forward, Params]:
    """Every layer's output is stacked by the scan; a learned mix of them makes the logits."""

    def fn(params: Params, tokens: Array) -> Array:
        def body(x: Array, p: Params) -> tuple[Array, Array]:
            x = x + causal_attention(p, rms_norm(x), tokens)
            return x, x

        _, outputs = lax.scan(body, params["embed"][tokens], params["layers"])
        return jnp.einsum("lbtd,l->btd", outputs, jnp.array([0.3, 0.7])) @ params["unembed"]

    return fn, stacked(attention_weights)


def scan_with_branch() -> tuple[Forward, Params]:
    """Even layers see everything, odd layers a window: `cond` on the layer's number picks the mask."""

    def fn(params: Params, tokens: Array) -> Array:
        distance = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])

        def body(x: Array, layer: tuple[Params, Array]) -> tuple[Array, None]:
            p, number = layer
            mask = lax.cond(number % 2 == 0, lambda: distance >= 0, lambda: (distance >= 0) & (distance < 5))
            return x + attend(p, rms_norm(x), mask), None

        x, _ = lax.scan(body, params["embed"][tokens], (params["layers"], jnp.arange(LAYERS)))
        return rms_norm(x) @ params["unembed"]

    return fn, stacked(attention_weights)


def scan_with_branching_blocks() -> tuple[Forward, Params]:
    """`cond` picks a whole block: attention in even layers, a recurrence in odd ones."""

    def fn(params: Params, tokens: Array) -> Array:
        def body(x: Array, layer: tuple[Params, Array]) -> tuple[Array, None]:
            p, even = layer
            y = lax.cond(even, lambda y: causal_attention(p, y, tokens), lambda y: gru(p, y, tokens), rms_norm(x))
            return x + y, None

        x, _ = lax.scan(body, params["embed"][tokens], (params["layers"], jnp.arange(LAYERS) % 2 == 0))
        return rms_norm(x) @ params["unembed"]

    return fn, stacked(recurrent_weights)


def switch_of_experts(p: Params, x: Array, tokens: Array) -> Array:
    """`lax.switch` on a parameter picks one of three maps for the layer."""
    branches = (jnp.tanh, jax.nn.gelu, jax.nn.silu)
    return causal_attention(p, lax.switch(p["choice"], branches, x), tokens)


def choice_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "choice": jnp.asarray(1, jnp.int32)}


def layers_by_fori_loop() -> tuple[Forward, Params]:
    """`fori_loop` over the layers, each indexed out of the stack."""

    def fn(params: Params, tokens: Array) -> Array:
        def body(i: Array, x: Array) -> Array:
            p = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), params["layers"])
            return x + causal_attention(p, rms_norm(x), tokens)

        return rms_norm(lax.fori_loop(0, LAYERS, body, params["embed"][tokens])) @ params["unembed"]

    return fn, stacked(attention_weights)


def queries_by_map(p: Params, x: Array, tokens: Array) -> Array:
    """One query at a time, by `lax.map`, against all keys."""
    q, k, v = heads(p, x)

    def attend_one(query: tuple[Array, Array]) -> Array:
        q, position = query
        s = jnp.einsum("bnh,bsnh->bns", q, k) / HEAD_DIM**0.5
        return jnp.einsum("bns,bsnh->bnh", softmax(s, jnp.arange(k.shape[1]) <= position), v)

    y = lax.map(attend_one, (jnp.moveaxis(q, 1, 0), jnp.arange(tokens.shape[1])))
    return jnp.einsum("tbnh,nhd->btd", y, p["o"])


def online_softmax(carry: tuple[Array, Array, Array], s: Array, v: Array) -> tuple[Array, Array, Array]:
    """Adds scores [B, T, N, S] and values [B, S, N, H] to a running maximum, sum and weighted sum."""
    largest, total, out = carry
    new = jnp.maximum(largest, s.max(axis=-1))
    old, e = jnp.exp(largest - new), jnp.exp(s - new[..., None])
    return new, total * old + e.sum(axis=-1), out * old[..., None] + jnp.einsum("btns,bsnh->btnh", e, v)


def online_start(q: Array) -> tuple[Array, Array, Array]:
    return jnp.full(q.shape[:3], -1e9), jnp.zeros(q.shape[:3]), jnp.zeros(q.shape)


def keys_by_scan(p: Params, x: Array, tokens: Array) -> Array:
    """One key at a time, by `lax.scan` (arXiv:2112.05682); all queries at once."""
    q, k, v = heads(p, x)
    positions = jnp.arange(tokens.shape[1])

    def step(carry: tuple[Array, Array, Array], key: tuple[Array, Array, Array]):
        k, v, position = key
        s = jnp.einsum("btnh,bnh->btn", q, k) / HEAD_DIM**0.5
        s = jnp.where((positions >= position)[:, None], s, -1e9)
        return online_softmax(carry, s[..., None], v[:, None]), None

    keys = (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), positions)
    (_, total, out), _ = lax.scan(step, online_start(q), keys)
    return jnp.einsum("btnh,nhd->btd", out / total[..., None], p["o"])


def key_blocks_by_scan(p: Params, x: Array, tokens: Array) -> Array:
    """Blocks of eight keys, sliced out one after another."""
    q, k, v = heads(p, x)
    positions = jnp.arange(tokens.shape[1])

    def step(carry: tuple[Array, Array, Array], start: Array):
        k_block, v_block = (lax.dynamic_slice_in_dim(y, start, BLOCK, axis=1) for y in (k, v))
        s = jnp.einsum("btnh,bsnh->btns", q, k_block) / HEAD_DIM**0.5
        s = jnp.where((positions[:, None] >= start + jnp.arange(BLOCK))[:, None], s, -1e9)
        return online_softmax(carry, s, v_block), None

    (_, total, out), _ = lax.scan(step, online_start(q), jnp.arange(0, tokens.shape[1], BLOCK))
    return jnp.einsum("btnh,nhd->btd", out / total[..., None], p["o"])


MODELS = (
    ZooModel("scan_layers", lambda: scanned(causal_attention)),
    ZooModel("scan_layers_remat", lambda: scanned(rematerialized)),
    ZooModel("scan_layers_mla", lambda: scanned(latent_attention, latent_weights)),
    ZooModel("scan_layers_recurrent", lambda: scanned(recurrent_and_attention, recurrent_weights)),
    ZooModel("scan_layers_scores_carried", scan_with_scores_carried),
    ZooModel("scan_layers_shared_keys", scan_with_shared_keys),
    ZooModel("scan_layers_collected", scan_collecting_layers),
    ZooModel("scan_layers_cond", scan_with_branch),
    ZooModel("scan_layers_cond_blocks", scan_with_branching_blocks),
    ZooModel("switch", lambda: decoder(switch_of_experts, choice_weights)),
    ZooModel("fori_layers", layers_by_fori_loop, optional=True),
    ZooModel("queries_by_map", lambda: decoder(queries_by_map)),
    ZooModel("keys_by_scan", lambda: decoder(keys_by_scan)),
    ZooModel("key_blocks_by_scan", lambda: decoder(key_blocks_by_scan), length_multiple=BLOCK, optional=True),
)
