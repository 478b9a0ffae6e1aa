"""`paged_attention`: writes new rows of keys and values into paged pools, then attends to a request's rows there.

It is `kv_update_read` of keys and of values and `attention` over what they read, as one operation, so that a kernel may
read pages where they lie. Meaning, for R requests of T new rows each:

    pool[layers, pages[r, p // Z], p % Z] = rows[r, t]    for p = positions[r, t], of keys and of values; all requests
                                                          write before any reads; positions outside are dropped
    key[r, s], value[r, s]                                row s of the request for s < lengths[r], and row 0 for others
    out[r, t] = attention of query[r, t] over key[r, :S] and value[r, :S]

A row at a position outside is padding: what its queries give is not said, and kernels differ there.

FLOPs: 2 R T N S (H + E). Bytes: rows written, queries, rows read and result. Shard rule: heads shard with KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from passes import compat
from passes.attention.expression import Expression
from passes.ops.attention import attention
from passes.ops.kv_update_read import kv_update_read_p


@dataclass(frozen=True)
class Operands:
    """The operands of the operation, each an array, an abstract one or a value of a graph.

    Attributes:
      query: `[R, T, N, H]`.
      pool_k, pool_v: `[*L, P, Z, *row]`, rows of K H and K E numbers.
      rows_k, rows_v: `[R, T, *row]`, in the pools' dtypes.
      positions: i32 `[R, T]`, of the new rows.
      pages: i32 `[R, M]`.
      lengths: i32 `[R]`, rows that are there after the step.
      layers: Indices into the leading axes of the pools, i32 scalars.
      scales: Where rows are stored rounded, the pool of scales of keys and the new rows' scales, and those of values:
        pools `[*L, P, Z, *row[:-1]]` and rows `[R, T, *row[:-1]]`; else none.
      leaves, sinks: As `attention` takes them; one of `sinks` or none.
    """

    query: Any
    pool_k: Any
    rows_k: Any
    pool_v: Any
    rows_v: Any
    positions: Any
    pages: Any
    lengths: Any
    layers: Sequence[Any] = ()
    scales: Sequence[Any] = ()
    leaves: Sequence[Any] = ()
    sinks: Sequence[Any] = ()

    @classmethod
    def of(cls, flat: Sequence[Any], *, num_layers: int, num_leaves: int, has_scales: bool) -> Operands:
        """From the flat operands of the operation."""
        query, pool_k, rows_k, pool_v, rows_v, positions, pages, lengths, *rest = flat
        parts, at = list[tuple[Any, ...]](), 0
        for count in (num_layers, 4 if has_scales else 0, num_leaves, len(rest)):
            parts.append(tuple(rest[at : at + count]))
            at += count
        return cls(query, pool_k, rows_k, pool_v, rows_v, positions, pages, lengths, *parts)

    @property
    def flat(self) -> list[Any]:
        fixed = (self.query, self.pool_k, self.rows_k, self.pool_v, self.rows_v)
        at = (self.positions, self.pages, self.lengths, *self.layers)
        return [*fixed, *at, *self.scales, *self.leaves, *self.sinks]

    def row_sizes(self, num_kv_heads: int) -> tuple[int, int]:
        """H and E."""
        first = len(self.layers) + 2
        sizes = (math.prod(pool.shape[first:]) // num_kv_heads for pool in (self.pool_k, self.pool_v))
        return next(sizes), next(sizes)


def paged_attention(
    operands: Operands,
    *,
    num_keys: int,
    num_kv_heads: int,
    sees_written_only: bool,
    row_dtype: Any,
    score: Expression,
    core_dtype: Any,
    weight_dtype: Any,
    out_dtype: Any,
) -> list[Any]:
    """Writes and attends.

    Args:
      num_keys: S, positions of a request that are read, from the first on.
      num_kv_heads: K.
      sees_written_only: Whether no query but those of padding sees a row at `lengths` or behind.
      row_dtype: Of rows as attention sees them.

    Returns: `[R, T, N, E]` in `out_dtype`, and after the writes the pools of keys and values, and of their scales.
    """
    return paged_attention_p.bind(
        *operands.flat,
        num_layers=len(operands.layers),
        num_leaves=len(operands.leaves),
        has_scales=bool(operands.scales),
        num_keys=num_keys,
        num_kv_heads=num_kv_heads,
        sees_written_only=sees_written_only,
        row_dtype=jnp.dtype(row_dtype),
        score=score,
        core_dtype=jnp.dtype(core_dtype),
        weight_dtype=jnp.dtype(weight_dtype),
        out_dtype=jnp.dtype(out_dtype),
    )


def _meaning(
    *flat: Any,
    num_layers: int,
    num_leaves: int,
    has_scales: bool,
    num_keys: int,
    num_kv_heads: int,
    sees_written_only: bool,
    row_dtype: Any,
    **how: Any,
) -> list[Any]:
    given = Operands.of(flat, num_layers=num_layers, num_leaves=num_leaves, has_scales=has_scales)
    is_written = jnp.arange(num_keys) < given.lengths[:, None]

    def read(pool: Any, rows: Any) -> tuple[Any, Any]:
        args = (pool, rows, given.positions, given.pages, *given.layers)
        view, pool = kv_update_read_p.bind(*args, length=num_keys)
        return view, pool

    def rows_of(pool: Any, rows: Any, *scales: Any) -> tuple[Any, list[Any]]:
        view, *pools = read(pool, rows)
        if scales:
            scale, scale_pool = read(*scales)
            view, pools = view.astype(jnp.float32) * scale[..., None].astype(jnp.float32), [*pools, scale_pool]
        view = view.astype(row_dtype).reshape(*view.shape[:2], num_kv_heads, -1)
        return jnp.where(is_written[..., None, None], view, view[:, :1]), pools

    key, of_keys = rows_of(given.pool_k, given.rows_k, *given.scales[:2])
    value, of_values = rows_of(given.pool_v, given.rows_v, *given.scales[2:])
    sinks = given.sinks[0] if given.sinks else None
    pools = [pool for pair in zip(of_keys, of_values, strict=True) for pool in pair]
    return [attention(given.query, key, value, given.leaves, sinks, **how), *pools]


def _abstract(
    *flat: Any, num_layers: int, num_leaves: int, has_scales: bool, num_kv_heads: int, out_dtype: Any, **_: Any
) -> list[Any]:
    given = Operands.of(flat, num_layers=num_layers, num_leaves=num_leaves, has_scales=has_scales)
    R, T, N, H = given.query.shape
    width, out_width = given.row_sizes(num_kv_heads)
    if width != H or N % num_kv_heads or tuple(given.positions.shape) != (R, T) or given.pages.shape[0] != R:
        raise ValueError(
            f"query [R, T, N, H], positions [R, T] and pages [R, M] must fit pools of rows of {num_kv_heads} heads, "
            f"got {given.query.shape}, {given.positions.shape}, {given.pages.shape} and {given.pool_k.shape}"
        )
    pools = [compat.shaped(pool.shape, pool.dtype) for pool in (given.pool_k, given.pool_v, *given.scales[::2])]
    return [compat.shaped((R, T, N, out_width), out_dtype), *pools]


paged_attention_p = compat.derive_rules(compat.make_primitive("paged_attention", _meaning, _abstract))
