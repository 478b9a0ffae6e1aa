"""`attention`: softmax attention whose mask and score function are expressions of indices.

Meaning, for batch b, query t, head n over keys s, with `kv = n // (N // K)` (GQA, arXiv:2305.13245):

    score[b, t, n, s] = expression(q[b, t, n] . k[b, s, kv], b, t, n, s, leaves)
    weight            = softmax over s, with exp(sink[b, t, n]) added to the denominator where there are sinks
    out[b, t, n]      = sum_s weight[b, t, n, s] v[b, s, kv]

FLOPs: 2 B T N S (H + E). Bytes: queries, keys, values and result once, where a kernel is selected. Shard rule: heads
shard with KV heads, batch with batch; the axes of queries and keys do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import compat
from passes.attention.expression import ROLES, Expression, Role, evaluate


def attention(
    query: Any,
    key: Any,
    value: Any,
    leaves: Sequence[Any] = (),
    sinks: Any | None = None,
    *,
    score: Expression,
    core_dtype: Any,
    weight_dtype: Any,
    out_dtype: Any,
) -> Any:
    """Attends.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`, N a multiple of K.
      value: `[B, S, K, E]`.
      leaves: Run-time arrays of the expression, each `[B or 1, T or 1, N or 1, S or 1]`.
      sinks: Logits that take part in the denominator alone, `[B or 1, T or 1, N or 1]`.
      score: The scores as an expression.
      core_dtype: Of the product of queries and keys.
      weight_dtype: In which the weights meet the values.

    Returns: `[B, T, N, E]` in `out_dtype`.
    """
    extra = [] if sinks is None else [sinks]
    params = {
        "score": score,
        "core_dtype": np.dtype(core_dtype),
        "weight_dtype": np.dtype(weight_dtype),
        "out_dtype": np.dtype(out_dtype),
        "num_leaves": len(leaves),
    }
    return attention_p.bind(query, key, value, *leaves, *extra, **params)


def scores_of(query: Any, key: Any, leaves: Sequence[Any], score: Expression, core_dtype: Any) -> Any:
    """Scores `[B, T, N, S]`, masked ones filled as the expression fills them."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H)
    core = _product("BTKGH,BSKH->BTKGS", grouped, key, core_dtype).reshape(B, T, N, S)
    return jnp.broadcast_to(evaluate(score, core, index_grid((B, T, N, S)), leaves), core.shape)


def _product(axes: str, first: Any, second: Any, dtype: Any) -> Any:
    """Widens operands to the result's dtype, which is exact: XLA's CPU backend does not run every mixed product."""
    if np.dtype(dtype).itemsize > max(first.dtype.itemsize, second.dtype.itemsize):
        first, second = first.astype(dtype), second.astype(dtype)
    return jnp.einsum(axes, first, second, preferred_element_type=dtype)


def index_grid(sizes: Sequence[int]) -> dict[Role, Any]:
    """For each role its indices, i32, along a dimension of its own."""
    grid: dict[Role, Any] = {}
    for place, (role, size) in enumerate(zip(ROLES, sizes, strict=True)):
        grid[role] = jax.lax.broadcasted_iota(jnp.int32, [size if i == place else 1 for i in range(4)], place)
    return grid


def _meaning(
    query: Any,
    key: Any,
    value: Any,
    *rest: Any,
    score: Expression,
    core_dtype: Any,
    weight_dtype: Any,
    out_dtype: Any,
    num_leaves: int,
) -> Any:
    scores = scores_of(query, key, rest[:num_leaves], score, core_dtype)
    sinks = rest[num_leaves] if len(rest) > num_leaves else None
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    if sinks is not None:
        top = jax.lax.stop_gradient(jnp.maximum(top, sinks[..., None]))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[..., None] - top)
    weights = (weights / total).astype(weight_dtype)
    B, T, N, S = weights.shape
    K = key.shape[2]
    grouped = weights.reshape(B, T, K, N // K, S)
    out = _product("BTKGS,BSKE->BTKGE", grouped, value.astype(weight_dtype), out_dtype)
    return out.reshape(B, T, N, value.shape[-1])


def _abstract(query: Any, key: Any, value: Any, *rest: Any, out_dtype: Any, **params: Any) -> Any:
    B, T, N, H = query.shape
    if key.shape[0] != B or key.shape[3] != H or N % key.shape[2] or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"attention takes query [B, T, N, H], key [B, S, K, H] and value [B, S, K, E] with N a multiple of K, got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    return compat.shaped((B, T, N, value.shape[-1]), out_dtype)


attention_p = compat.derive_rules(compat.make_primitive("attention", _meaning, _abstract, multiple_results=False))
