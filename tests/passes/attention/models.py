"""Attention as public models write it, each in a dozen lines, at sizes of a few numbers.

Imports nothing of the compiler. Only the spelling follows the models; names and code are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODELS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
"""By name: makes the function and its arguments. Every one writes one attention."""

_Made = tuple[Callable[..., Any], tuple[Any, ...]]


def _model(fn: Callable[[], _Made]) -> Callable[[], _Made]:
    MODELS[fn.__name__] = fn
    return fn


def _arrays(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Any, ...]:
    random = np.random.RandomState(seed)
    return tuple(random.randn(*shape).astype(np.float32) for shape in shapes)


def _split_heads(x: Any, num_heads: int) -> Any:
    B, T, D = x.shape
    return x.reshape(B, T, num_heads, D // num_heads).transpose(0, 2, 1, 3)


def _merge_heads(x: Any) -> Any:
    B, N, T, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, N * H)


def _rotate(x: Any, base: float = 10000.0) -> Any:
    """Half-split rotary positions over `[..., T, H]`."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[-2]), base ** (-jnp.arange(half) / half))
    angles = jnp.concatenate([angles, angles], axis=-1)
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * jnp.cos(angles) + turned * jnp.sin(angles)


def _repeat_kv(x: Any, groups: int) -> Any:
    B, K, S, H = x.shape
    return jnp.broadcast_to(x[:, :, None], (B, K, groups, S, H)).reshape(B, K * groups, S, H)


@_model
def gpt2() -> _Made:
    """One product for queries, keys and values; a buffer of ones cut to the length; a fill by product."""
    buffer = np.tril(np.ones((1, 1, 16, 16), np.float32))

    def fn(x: Any, w: Any, w_out: Any) -> Any:
        q, k, v = (_split_heads(part, 3) for part in jnp.split(x @ w, 3, axis=-1))
        T, S = q.shape[-2], k.shape[-2]
        scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2)) / np.float32(math.sqrt(v.shape[-1]))
        seen = jnp.asarray(buffer)[:, :, S - T : S, :S]
        scores = scores * seen - 1e10 * (1 - seen)
        return _merge_heads(jax.nn.softmax(scores, axis=-1) @ v) @ w_out

    return fn, _arrays((2, 5, 12), (12, 36), (12, 12))


@_model
def llama() -> _Made:
    """Rotated, keys and values repeated, an additive mask with padding, softmax in float32."""

    def fn(x: Any, wq: Any, wk: Any, wv: Any, padding: Any) -> Any:
        x = x.astype(jnp.bfloat16)
        q, k, v = (_split_heads(x @ w.astype(x.dtype), n) for w, n in ((wq, 4), (wk, 2), (wv, 2)))
        q, k = _rotate(q).astype(x.dtype), _rotate(k).astype(x.dtype)
        k, v = _repeat_kv(k, 2), _repeat_kv(v, 2)
        T = x.shape[1]
        low = jnp.finfo(x.dtype).min
        mask = jnp.triu(jnp.full((T, T), low, x.dtype), k=1)[None, None]
        mask = jnp.where((mask == 0) & (padding[:, None, None, :] == 1), jnp.zeros((), x.dtype), low)
        scores = jnp.matmul(q, k.transpose(0, 1, 3, 2)) / math.sqrt(q.shape[-1]) + mask
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
        return _merge_heads(weights @ v)

    padding = np.int32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return fn, (*_arrays((2, 5, 16), (16, 16), (16, 8), (16, 8)), padding)


@_model
def gemma2() -> _Made:
    """Grouped heads, queries scaled, scores capped, a sliding window."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        B, T, N, H = q.shape
        K = k.shape[2]
        q = (q * 16**-0.5).reshape(B, T, K, N // K, H)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k).reshape(B, T, N, -1)
        logits = jnp.tanh(logits / 50.0) * 50.0
        at = jnp.arange(T)[None]
        causal = at[:, :, None] >= at[:, None, :]
        sliding = jnp.triu(jnp.ones_like(causal), -2) * jnp.tril(jnp.ones_like(causal), 2)
        seen = causal * sliding
        probs = jax.nn.softmax(jnp.where(seen[:, :, None, :], logits, -2.3819763e38), axis=-1)
        probs = probs.reshape(B, T, K, N // K, -1)
        return jnp.einsum("BTKGS,BSKH->BTKGH", probs, v).reshape(B, T, N, H)

    return fn, _arrays((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))


@_model
def t5() -> _Made:
    """No scale; a table of biases by the logarithm of distances."""

    def bucket(distance: Any, buckets: int = 8, furthest: int = 16) -> Any:
        buckets //= 2
        side = (distance > 0).astype(jnp.int32) * buckets
        distance = jnp.abs(distance)
        near = buckets // 2
        grown = jnp.log(distance.astype(jnp.float32) / near + 1e-6) / math.log(furthest / near) * (buckets - near)
        return side + jnp.where(distance < near, distance, jnp.minimum(near + grown.astype(jnp.int32), buckets - 1))

    def fn(q: Any, k: Any, v: Any, table: Any, padding: Any) -> Any:
        T, S = q.shape[2], k.shape[2]
        places = bucket(jnp.arange(S)[None, :] - jnp.arange(T)[:, None])
        bias = jnp.take(table, places, axis=0).transpose(2, 0, 1)[None]
        bias = bias + (1.0 - padding[:, None, None, :].astype(jnp.float32)) * jnp.finfo(jnp.float32).min
        scores = jnp.einsum("bnqd,bnkd->bnqk", q, k) + bias
        return jnp.einsum("bnqk,bnkd->bnqd", jax.nn.softmax(scores, axis=-1), v)

    padding = np.int32([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return fn, (*_arrays((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 4), (8, 3)), padding)


@_model
def bloom() -> _Made:
    """ALiBi from the keys' places among the tokens that are no padding; batch and heads as one dimension."""

    def fn(x: Any, w: Any, padding: Any) -> Any:
        B, T, D = x.shape
        N, H = 4, D // 4
        fused = (x @ w).reshape(B, T, N, 3, H)
        q, k, v = (fused[..., i, :].transpose(0, 2, 1, 3).reshape(B * N, T, H) for i in range(3))
        slopes = 2.0 ** (-8.0 / N * jnp.arange(1, N + 1))
        place = ((jnp.cumsum(padding, axis=-1) - 1) * padding)[:, None, :]
        alibi = (slopes[None, :, None] * place).reshape(B * N, 1, T)
        scores = alibi + (1.0 / math.sqrt(H)) * jnp.matmul(q, k.transpose(0, 2, 1))
        scores = scores.reshape(B, N, T, T)
        causal = jnp.tril(jnp.ones((T, T), bool))[None, None] & (padding[:, None, None, :] > 0)
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).reshape(B * N, T, T)
        out = jnp.matmul(weights, v).reshape(B, N, T, H)
        return _merge_heads(out)

    return fn, (*_arrays((2, 5, 16), (16, 48)), np.int32([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]))


@_model
def mpt() -> _Made:
    """ALiBi as a bias over keys that a causal mask joins, keys stored turned over."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        T, N = q.shape[2], q.shape[1]
        slopes = (1.0 / 2.0 ** (jnp.arange(1, N + 1) * 8.0 / N)).reshape(1, N, 1, 1)
        bias = jnp.arange(1 - T, 1, dtype=jnp.int32).reshape(1, 1, 1, T) * slopes
        weight = jnp.matmul(q, k) * q.shape[-1] ** -0.5
        weight = weight + bias
        hidden = ~jnp.tril(jnp.ones((T, T), jnp.float16)).astype(bool)
        weight = jnp.where(hidden.reshape(1, 1, T, T), jnp.finfo(weight.dtype).min, weight)
        return jnp.matmul(jax.nn.softmax(weight, axis=-1), v)

    return fn, _arrays((2, 4, 5, 6), (2, 4, 6, 5), (2, 4, 5, 6))


@_model
def falcon() -> _Made:
    """One head of keys and values, as the last two columns of the fused product."""

    def fn(x: Any, w: Any) -> Any:
        B, T, D = x.shape
        N = 4
        fused = (x @ w).reshape(B, T, N + 2, D // N)
        q, k, v = fused[:, :, :-2], fused[:, :, [-2]], fused[:, :, [-1]]
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
        q, k = _rotate(q), _rotate(k)
        scores = jnp.matmul(q, k.swapaxes(-1, -2)) / math.sqrt(D // N)
        mask = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, -1e9)
        return _merge_heads(jnp.matmul(jax.nn.softmax(scores + mask, axis=-1), v))

    return fn, _arrays((2, 5, 16), (16, 24))


@_model
def qwen() -> _Made:
    """Normed, rotated queries and keys with grouped heads, a mask argument, inside a checkpoint."""

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    @jax.checkpoint
    def fn(q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
        q, k = _rotate(norm(q, scale)), _rotate(norm(k, scale))
        k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * 8**-0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bhkd->bqhd", weights, v).reshape(q.shape[0], q.shape[2], -1)

    mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 1, 5, 5))
    return fn, (*_arrays((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (8,)), mask)


@_model
def phi() -> _Made:
    """Part of the width rotated, products in float32, queries scaled first."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        q, k = (jnp.concatenate([_rotate(x[..., :4]), x[..., 4:]], axis=-1) for x in (q, k))
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        scores = jnp.matmul(q.astype(jnp.float32) * 0.35, k.astype(jnp.float32).swapaxes(-1, -2))
        T, S = scores.shape[-2:]
        scores += jnp.where(jnp.arange(S) > jnp.arange(T)[:, None] + (S - T), -jnp.inf, 0.0)
        return jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v).transpose(0, 2, 1, 3)

    return fn, _arrays((2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8))


@_model
def mistral() -> _Made:
    """No batch; a causal window as logarithms of ones and zeros; every layer of a scan."""

    def fn(x: Any, wq: Any, wk: Any, wv: Any, wo: Any) -> Any:
        T = x.shape[0]
        band = jnp.triu(jnp.tril(jnp.ones((T, T))), k=-2)
        mask = jnp.log(band)

        def layer(x: Any, weights: Any) -> Any:
            q, k, v = ((x @ w).reshape(T, -1, 4) for w in weights[:3])
            k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
            scores = jnp.einsum("thd,shd->hts", q, k) * 0.5 + mask[None]
            out = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), v).reshape(T, -1)
            return x + out @ weights[3], None

        return jax.lax.scan(layer, x, (wq, wk, wv, wo))[0]

    return fn, _arrays((6, 8), (2, 8, 16), (2, 8, 8), (2, 8, 8), (2, 16, 8))


def _deepseek(*, is_absorbed: bool) -> _Made:
    def fn(q: Any, latent: Any, shared: Any, up_k: Any, up_v: Any) -> Any:
        T = q.shape[1]
        q, turned = q[..., :6], q[..., 6:]
        turned = _rotate(turned.swapaxes(1, 2)).swapaxes(1, 2)
        shared = _rotate(shared)
        mask = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, -jnp.inf)[None, :, None, :]
        if is_absorbed:
            q = jnp.einsum("bshd,hdc->bshc", q, up_k)
            scores = jnp.einsum("bshc,btc->bsht", q, latent) + jnp.einsum("bshr,btr->bsht", turned, shared)
            weights = jax.nn.softmax(scores * 0.35 + mask, axis=-1)
            return jnp.einsum("bshc,hcd->bshd", jnp.einsum("bsht,btc->bshc", weights, latent), up_v)
        k, v = jnp.einsum("btc,hdc->bthd", latent, up_k), jnp.einsum("btc,hcd->bthd", latent, up_v)
        k = jnp.concatenate([k, jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], 4))], axis=-1)
        scores = jnp.einsum("bshd,bthd->bsht", jnp.concatenate([q, turned], axis=-1), k)
        weights = jax.nn.softmax(scores * 0.35 + mask, axis=-1)
        return jnp.einsum("bsht,bthd->bshd", weights, v)

    return fn, _arrays((2, 5, 3, 10), (2, 5, 7), (2, 5, 4), (3, 6, 7), (3, 7, 6))


@_model
def deepseek() -> _Made:
    """Keys and values unfolded from a latent, the rotated part of the keys shared by all heads."""
    return _deepseek(is_absorbed=False)


@_model
def deepseek_absorbed() -> _Made:
    """Queries folded into the latent, which is key and value at once; scores as a sum of two products."""
    return _deepseek(is_absorbed=True)


@_model
def gpt_oss() -> _Made:
    """Sinks as a column of scores that is dropped behind the softmax, a sliding window, grouped heads."""

    def fn(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        T, K, G, H = q.shape
        k = jnp.broadcast_to(k[:, :, None, :], (T, K, G, H))
        v = jnp.broadcast_to(v[:, :, None, :], (T, K, G, H))
        column = jnp.broadcast_to(sinks.reshape(K, G, 1, 1), (K, G, T, 1))
        mask = jnp.triu(jnp.full((T, T), -jnp.inf), k=1) + jnp.tril(jnp.full((T, T), -jnp.inf), k=-3)
        scores = jnp.einsum("qhmd,khmd->hmqk", q, k) * (1 / math.sqrt(H)) + mask[None, None]
        joined = jnp.concatenate([scores, column], axis=-1)
        weights = jax.nn.softmax(joined - joined.max(axis=-1, keepdims=True), axis=-1)[..., :-1]
        return jnp.einsum("hmqk,khmd->qhmd", weights, v).reshape(T, -1)

    return fn, _arrays((6, 2, 3, 4), (6, 2, 4), (6, 2, 4), (6,))


@_model
def gptj() -> _Made:
    """Interleaved rotation, products in float32, a constant mask of a longer context."""
    buffer = np.tril(np.ones((1, 1, 12, 12), bool))

    def turn(x: Any) -> Any:
        half = x.shape[-1] // 2
        angles = jnp.repeat(jnp.outer(jnp.arange(x.shape[1]), 0.1 ** jnp.arange(half)), 2, axis=-1)[:, None]
        turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
        return x * jnp.cos(angles) + turned * jnp.sin(angles)

    def fn(q: Any, k: Any, v: Any) -> Any:
        q, k, v = turn(q).transpose(0, 2, 1, 3), turn(k).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        T = q.shape[2]
        scores = jnp.where(buffer[:, :, :T, :T], q @ k.swapaxes(-1, -2), jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(scores / 2.0, axis=-1) @ v

    return fn, _arrays((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4))


@_model
def jax_own() -> _Made:
    """JAX's own function, with grouped heads, a bias and lengths."""

    def fn(q: Any, k: Any, v: Any, bias: Any, lengths: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True, key_value_seq_lengths=lengths)

    return fn, (*_arrays((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), (1, 4, 5, 5)), np.int32([5, 3]))


@_model
def decode_step() -> _Made:
    """One query for each request over a cache that is filled to a length of its own."""

    def fn(q: Any, keys: Any, values: Any, length: Any) -> Any:
        def one(q: Any, keys: Any, values: Any, length: Any) -> Any:
            seen = jnp.arange(keys.shape[0]) <= length
            scores = jnp.where(seen, jnp.einsum("nh,snh->ns", q, keys) * 0.5, -jnp.inf)
            return jnp.einsum("ns,snh->nh", jax.nn.softmax(scores, axis=-1), values)

        return jax.vmap(one)(q, keys, values, length)

    return fn, (*_arrays((3, 4, 8), (3, 6, 4, 8), (3, 6, 4, 8)), np.int32([0, 2, 5]))
