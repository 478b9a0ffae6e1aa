"""Attention by `jax.nn.dot_product_attention`, and reshapes by einops."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import einsum, rearrange, reduce, repeat
from jax import Array

from .blocks import HEAD_DIM, HEADS, Draw, Params, attention_weights, causal_mask, decoder, heads, project, softmax
from .model import ZooModel


def output(p: Params, y: Array) -> Array:
    """Heads [B, T, N, H] back to [B, T, D]."""
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def is_causal(p: Params, x: Array, tokens: Array) -> Array:
    return output(p, jax.nn.dot_product_attention(*heads(p, x), is_causal=True))


def with_mask(p: Params, x: Array, tokens: Array) -> Array:
    mask = causal_mask(tokens.shape[1])[None, None]
    return output(p, jax.nn.dot_product_attention(*heads(p, x), mask=mask))


def with_window(p: Params, x: Array, tokens: Array) -> Array:
    return output(p, jax.nn.dot_product_attention(*heads(p, x), is_causal=True, local_window_size=(5, 0)))


def with_bias(p: Params, x: Array, tokens: Array) -> Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    bias = -0.3 * jnp.abs(positions[:, None] - positions)[None, None]
    return output(p, jax.nn.dot_product_attention(*heads(p, x), bias=bias, is_causal=True, scale=0.5))


def einops_merged(p: Params, x: Array, tokens: Array) -> Array:
    """`(b h) t d` around batched products."""
    batch = x.shape[0]
    q, k, v = (rearrange(y, "b t h d -> (b h) t d") for y in heads(p, x))
    s = einsum(q, k, "b t d, b s d -> b t s") / HEAD_DIM**0.5
    y = softmax(s, causal_mask(tokens.shape[1])) @ v
    return rearrange(y, "(b h) t d -> b t (h d)", b=batch) @ rearrange(p["o"], "h d e -> (h d) e")


def einops_heads_over_time(p: Params, x: Array, tokens: Array) -> Array:
    """`(h t)` and `(t h)` in passing, with the single request as a group of size one."""
    q, k, v = heads(p, x)
    q = rearrange(rearrange(q, "b t (h g) d -> b g (h t) d", g=1), "b g (h t) d -> b t (g h) d", h=HEADS)
    k = rearrange(jnp.tanh(rearrange(k, "b t h d -> (b t h) d")), "(b t h) d -> b h d t", b=len(x), h=HEADS)
    s = einsum(q, k, "b t h d, b h d s -> b h t s") / HEAD_DIM**0.5
    y = einsum(softmax(s, causal_mask(tokens.shape[1])), v, "b h t s, b s h d -> b t h d")
    return einsum(y, p["o"], "b t h d, h d e -> b t e")


def einops_flat_tokens(p: Params, x: Array, tokens: Array) -> Array:
    """Token-wise work on `(b t) d`; keys repeated by einops; squares of the heads reduced by it."""
    flat = rearrange(x, "b t d -> (b t) d")
    q = rearrange(flat @ rearrange(p["q"], "d h e -> d (h e)"), "(b t) (h e) -> b h t e", b=len(x), h=HEADS)
    k, v = (repeat(project(x, p[n]), "b t k e -> b (k g) t e", g=HEADS // p[n].shape[1]) for n in ("k", "v"))
    k = k / jnp.sqrt(reduce(jnp.square(k), "b h t e -> b h t 1", "mean") + 1e-6)
    y = softmax(q @ rearrange(k, "b h t e -> b h e t") / HEAD_DIM**0.5, causal_mask(tokens.shape[1])) @ v
    return output(p, rearrange(y, "b h t e -> b t h e"))


def two_key_heads(draw: Draw) -> Params:
    return attention_weights(draw, kv_heads=2)


MODELS = (
    ZooModel("jax_nn_is_causal", lambda: decoder(is_causal)),
    ZooModel("jax_nn_mask", lambda: decoder(with_mask)),
    ZooModel("jax_nn_window", lambda: decoder(with_window)),
    ZooModel("jax_nn_bias", lambda: decoder(with_bias)),
    ZooModel("jax_nn_gqa", lambda: decoder(is_causal, two_key_heads)),
    ZooModel("jax_nn_mqa_mask", lambda: decoder(with_mask, partial(attention_weights, kv_heads=1))),
    ZooModel("einops_merged", lambda: decoder(einops_merged)),
    ZooModel("einops_heads_over_time", lambda: decoder(einops_heads_over_time)),
    ZooModel("einops_flat_tokens", lambda: decoder(einops_flat_tokens, two_key_heads)),
)
