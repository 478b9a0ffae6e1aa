"""Carried state: cumulative sums, associative scans, scans over time, and linear attention in its two forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import associative_scan

from .blocks import HEAD_DIM, HEADS, WIDTH, Draw, Params, attention_weights, causal_mask, decoder, heads
from .model import ZooModel
from .shifts import by_pad, conv_padding

STATE = 6


def square_weights(draw: Draw) -> Params:
    return {name: draw(WIDTH, WIDTH) for name in ("a", "b", "c")}


def running_mean(p: Params, x: Array, tokens: Array) -> Array:
    count = 1.0 + jnp.arange(tokens.shape[1])
    return jnp.cumsum(jnp.tanh(x @ p["a"]), axis=1) / count[:, None]


def running_products(p: Params, x: Array, tokens: Array) -> Array:
    """A cumulative product and a cumulative maximum."""
    return jnp.cumprod(0.9 + 0.2 * jax.nn.sigmoid(x @ p["a"]), axis=1) + lax.cummax(x @ p["b"], axis=1)


def running_log_sum(p: Params, x: Array, tokens: Array) -> Array:
    """A softmax over the past, channel by channel, from two cumulative sums in the logarithm's domain."""
    score = x @ p["a"]
    total = lax.cumlogsumexp(score, axis=1)
    bottom = jnp.exp(lax.cummax(score, axis=1) - total)
    return jnp.cumsum(jnp.exp(score) * x, axis=1) / jnp.exp(total) + bottom


def linear_recurrence(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """Composes two steps `h -> gate * h + value`."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def gated_scan(p: Params, x: Array, tokens: Array) -> Array:
    return lax.associative_scan(linear_recurrence, (jax.nn.sigmoid(x @ p["a"]), x @ p["b"]), axis=1)[1]


def gated_scan_by_name(p: Params, x: Array, tokens: Array) -> Array:
    """The same with the function imported by name, time in front and the step written in place."""
    gate, value = jax.nn.sigmoid(x @ p["a"]).swapaxes(0, 1), (x @ p["b"]).swapaxes(0, 1)
    _, h = associative_scan(lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1]), (gate, value))
    return h.swapaxes(0, 1)


def running_maximum_scan(p: Params, x: Array, tokens: Array) -> Array:
    """An associative scan of one array."""
    return jax.lax.associative_scan(jnp.maximum, x @ p["a"], axis=1)


def real_gated_lru(p: Params, x: Array, tokens: Array) -> Array:
    """RG-LRU of Griffin (arXiv:2402.19427): a short convolution, then a gated diagonal recurrence."""
    y = conv_padding(x, p["kernel"])
    log_a = -4.0 * jax.nn.softplus(p["lambda"]) * jax.nn.sigmoid(y @ p["a"])
    value = jnp.sqrt(-jnp.expm1(2.0 * log_a)) * jax.nn.sigmoid(y @ p["b"]) * y
    _, h = lax.associative_scan(linear_recurrence, (jnp.exp(log_a), value), axis=1)
    return h * jax.nn.gelu(x @ p["c"])


def lru_weights(draw: Draw) -> Params:
    return {**square_weights(draw), "lambda": draw(WIDTH) - 2.0, "kernel": draw(4, 1, WIDTH)}


def gru(p: Params, x: Array, tokens: Array) -> Array:
    """A gated recurrent unit by `lax.scan` over time."""

    def step(h: Array, row: Array) -> tuple[Array, Array]:
        gate = jax.nn.sigmoid(row @ p["a"] + h @ p["b"])
        h = gate * h + (1.0 - gate) * jnp.tanh(row + h @ p["c"])
        return h, h

    _, states = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))
    return states.swapaxes(0, 1)


def lstm(p: Params, x: Array, tokens: Array) -> Array:
    """Two carried arrays, a learned initial state, the scan unrolled four times."""

    def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        forget, write, out, value = jnp.split(row + h @ p["recurrent"], 4, axis=-1)
        c = jax.nn.sigmoid(forget + 1.0) * c + jax.nn.sigmoid(write) * jnp.tanh(value)
        h = jax.nn.sigmoid(out) * jnp.tanh(c)
        return (h, c), h

    first = jnp.broadcast_to(p["first"], (x.shape[0], WIDTH))
    _, states = lax.scan(step, (first, jnp.zeros_like(first)), jnp.moveaxis(x @ p["input"], 1, 0), unroll=4)
    return jnp.moveaxis(states, 0, 1)


def lstm_weights(draw: Draw) -> Params:
    return {"recurrent": draw(WIDTH, 4 * WIDTH), "input": draw(WIDTH, 4 * WIDTH), "first": draw(WIDTH)}


def mamba(p: Params, x: Array, tokens: Array) -> Array:
    """A selective state-space block (arXiv:2312.00752): convolution, then a scan whose step depends on the token."""
    y, gate = jnp.split(x @ p["input"], 2, axis=-1)
    y = jax.nn.silu(conv_padding(y, p["kernel"]))
    delta, b, c = jax.nn.softplus(y @ p["delta"]), y @ p["b"], y @ p["c"]

    def step(h: Array, row: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        y, delta, b, c = row
        h = jnp.exp(-delta[..., None] * jnp.exp(p["log_a"])) * h + (delta * y)[..., None] * b[:, None, :]
        return h, jnp.einsum("bds,bs->bd", h, c)

    rows = jax.tree.map(lambda a: a.swapaxes(0, 1), (y, delta, b, c))
    _, out = lax.scan(step, jnp.zeros((x.shape[0], WIDTH, STATE)), rows)
    return (out.swapaxes(0, 1) + p["skip"] * y) * jax.nn.silu(gate)


def mamba_weights(draw: Draw) -> Params:
    return {
        "input": draw(WIDTH, 2 * WIDTH),
        "kernel": draw(4, 1, WIDTH),
        "delta": draw(WIDTH, WIDTH),
        "b": draw(WIDTH, STATE),
        "c": draw(WIDTH, STATE),
        "log_a": draw(WIDTH, STATE, scale=0.5),
        "skip": draw(WIDTH),
    }


def rwkv(p: Params, x: Array, tokens: Array) -> Array:
    """RWKV-4 (arXiv:2305.13048): token shift, the stabilised `wkv` recurrence, and a channel mix."""
    past = by_pad(x)
    k, v, r = ((x * m + past * (1.0 - m)) @ w for m, w in zip(jax.nn.sigmoid(p["mix"]), p["kvr"], strict=True))
    decay = -jnp.exp(p["decay"])

    def step(carry: tuple[Array, Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        top, bottom, largest = carry
        k, v = row
        m = jnp.maximum(largest, k + p["bonus"])
        old, new = jnp.exp(largest - m), jnp.exp(k + p["bonus"] - m)
        out = (old * top + new * v) / (old * bottom + new)
        m = jnp.maximum(largest + decay, k)
        old, new = jnp.exp(largest + decay - m), jnp.exp(k - m)
        return (old * top + new * v, old * bottom + new, m), out

    zeros = jnp.zeros((x.shape[0], WIDTH))
    _, wkv = lax.scan(step, (zeros, zeros, zeros - 1e30), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
    y = jax.nn.sigmoid(r) * wkv.swapaxes(0, 1)
    return y + jnp.square(jax.nn.relu(by_pad(y) @ p["channel"]))


def rwkv_weights(draw: Draw) -> Params:
    return {
        "mix": draw(3, WIDTH),
        "kvr": draw(3, WIDTH, WIDTH, scale=WIDTH**-0.5),
        "decay": draw(WIDTH),
        "bonus": draw(WIDTH),
        "channel": draw(WIDTH, WIDTH),
    }


def delta_rule(p: Params, x: Array, tokens: Array) -> Array:
    """DeltaNet (arXiv:2406.06484): a matrix per head that is corrected towards each value."""
    q, k, v = heads(p, x)
    k = k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-6)
    beta = jax.nn.sigmoid(x @ p["beta"])

    def step(memory: Array, row: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v, beta = row
        error = v - jnp.einsum("bnij,bni->bnj", memory, k)
        memory = memory + jnp.einsum("bni,bnj->bnij", k, error * beta[..., None])
        return memory, jnp.einsum("bnij,bni->bnj", memory, q)

    rows = tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v, beta))
    _, out = lax.scan(step, jnp.zeros((x.shape[0], HEADS, HEAD_DIM, HEAD_DIM)), rows)
    return jnp.einsum("tbnh,nhd->btd", out, p["o"])


def delta_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "beta": draw(WIDTH, HEADS)}


def linear_attention(p: Params, x: Array, tokens: Array) -> Array:
    """Sums of outer products, and of keys, by `cumsum` (arXiv:2006.16236)."""
    q, k, v = heads(p, x)
    q, k = jax.nn.elu(q) + 1.0, jax.nn.elu(k) + 1.0
    memory = jnp.cumsum(jnp.einsum("btni,btnj->btnij", k, v), axis=1)
    total = jnp.einsum("btni,btni->btn", q, jnp.cumsum(k, axis=1))
    return jnp.einsum("btnj,njd->btd", jnp.einsum("btni,btnij->btnj", q, memory) / total[..., None], p["o"])


def retention(p: Params, x: Array, tokens: Array) -> Array:
    """A matrix of powers of the distance in place of the softmax (arXiv:2307.08621)."""
    q, k, v = heads(p, x)
    distance = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])
    rates = 1.0 - 2.0 ** -(1.0 + jnp.arange(HEADS))
    decay = jnp.where(distance >= 0, rates[:, None, None] ** distance, 0.0)
    y = jnp.einsum("bnts,bsnh->btnh", jnp.einsum("btnh,bsnh->bnts", q, k) * decay / HEAD_DIM, v)
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def gated_linear_attention(p: Params, x: Array, tokens: Array) -> Array:
    """Decay by the differences of a cumulative sum of logarithms of gates (arXiv:2312.06635)."""
    q, k, v = heads(p, x)
    log_decay = jnp.cumsum(jax.nn.log_sigmoid(x @ p["beta"] + 2.0), axis=1).swapaxes(1, 2)
    mask = causal_mask(tokens.shape[1])
    decay = jnp.exp(jnp.where(mask, log_decay[..., :, None] - log_decay[..., None, :], -jnp.inf))
    y = jnp.einsum("bnts,bsnh->btnh", jnp.einsum("btnh,bsnh->bnts", q, k) * decay / HEAD_DIM, v)
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def forgetting_attention(p: Params, x: Array, tokens: Array) -> Array:
    """The same differences as a bias inside a softmax (arXiv:2503.02130)."""
    q, k, v = heads(p, x)
    total = jnp.cumsum(jax.nn.log_sigmoid(x @ p["beta"]), axis=1).swapaxes(1, 2)
    s = jnp.einsum("btnh,bsnh->bnts", q, k) + total[..., :, None] - total[..., None, :]
    probs = jax.nn.softmax(jnp.where(causal_mask(tokens.shape[1]), s, -jnp.inf), axis=-1)
    return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", probs, v), p["o"])


MODELS = (
    ZooModel("running_mean", lambda: decoder(running_mean, square_weights)),
    ZooModel("running_products", lambda: decoder(running_products, square_weights)),
    ZooModel("running_log_sum", lambda: decoder(running_log_sum, square_weights)),
    ZooModel("gated_scan", lambda: decoder(gated_scan, square_weights)),
    ZooModel("gated_scan_by_name", lambda: decoder(gated_scan_by_name, square_weights)),
    ZooModel("running_maximum_scan", lambda: decoder(running_maximum_scan, square_weights)),
    ZooModel("rg_lru", lambda: decoder(real_gated_lru, lru_weights)),
    ZooModel("gru", lambda: decoder(gru, square_weights)),
    ZooModel("lstm", lambda: decoder(lstm, lstm_weights)),
    ZooModel("mamba", lambda: decoder(mamba, mamba_weights)),
    ZooModel("rwkv", lambda: decoder(rwkv, rwkv_weights)),
    ZooModel("delta_rule", lambda: decoder(delta_rule, delta_weights)),
    ZooModel("linear_attention", lambda: decoder(linear_attention)),
    ZooModel("retention", lambda: decoder(retention)),
    ZooModel("gated_linear_attention", lambda: decoder(gated_linear_attention, delta_weights)),
    ZooModel("forgetting_attention", lambda: decoder(forgetting_attention, delta_weights)),
)
