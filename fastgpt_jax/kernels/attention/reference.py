"""Attention as its definition says, all scores at once: what every other implementation is held against.

Scores and softmax are float32, or float64 where the inputs are. Memory grows with T times S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastgpt_jax.kernels.attention.spec import (
    AttentionSpec,
    Keys,
    Queries,
    Result,
    Sinks,
    Values,
    check,
    over_requests,
    without_dead_keys,
)


def supports(spec: AttentionSpec, query: Any, key: Any, value: Any, leaves: Sequence[Any] = ()) -> str | None:
    """None: the reference takes everything that can be said."""
    return None


def attend(
    spec: AttentionSpec,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
) -> Result:
    """Attends; see `fastgpt_jax.kernels.attention.spec`."""
    check(spec, query, key, value, leaves, sinks)

    def one(query: Array, key: Array, value: Array, leaves: Sequence[Any]) -> tuple[Array, Array]:
        return _attend_one(spec, query, key, value, leaves, sinks)

    mapped, leaves = over_requests(one, 3, leaves)
    return mapped(query, key, value, leaves)


def _attend_one(
    spec: AttentionSpec,
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K E"],
    leaves: Sequence[Any],
    sinks: Array | None,
) -> tuple[Float[Array, "T N E"], Float[Array, "N T"]]:
    dtype = jnp.dtype(jnp.float64 if query.dtype == jnp.float64 else jnp.float32)
    T, N, H = query.shape
    S, K = key.shape[:2]
    q, k = jnp.arange(T, dtype=jnp.int32)[:, None], jnp.arange(S, dtype=jnp.int32)[None, :]
    head = jnp.arange(N, dtype=jnp.int32).reshape(K, N // K, 1, 1)
    key, value = without_dead_keys(spec.mask, key, value, leaves)
    grouped = query.reshape(T, K, N // K, H).astype(dtype)
    products = jnp.einsum("tkgh,skh->kgts", grouped, key.astype(dtype), precision="highest")
    scores = spec.scores(products, head, q, k, leaves)
    scores = jnp.where(spec.mask.contains(q, k, leaves), scores, -jnp.inf)
    sink = jnp.full((K, N // K, 1), -jnp.inf, dtype)
    if sinks is not None:
        sink = sinks.astype(dtype).reshape(sink.shape)
    top = jnp.maximum(scores.max(axis=-1), sink)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, jnp.zeros((), dtype), top))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1) + jnp.exp(sink - top)
    out = jnp.einsum("kgts,ske->tkge", weights, value.astype(dtype), precision="highest")
    divisor = jnp.where(total == 0, jnp.ones((), dtype), total)
    out = out / divisor.transpose(2, 0, 1)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(divisor) + top)
    return out.reshape(T, N, -1).astype(query.dtype), lse.reshape(N, T)
