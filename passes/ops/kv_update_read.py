"""`kv_update_read`: writes new rows into a paged pool, then reads the pages of a request, as one operation.

Write-then-read lets XLA update a donated pool in place (read-then-write makes it copy the pool), and the operation's
own batching rule keeps the pool unbatched when a step is mapped over requests. Meaning, for one request:

    pool[layer, pages[p // Z], p % Z] = rows[i]    for each i, p = positions[i]; positions outside are dropped
    view[s] = pool[layer, pages[s // Z], s % Z]    for s < length

FLOPs: 0. Bytes: rows written and view read. Shard rule: the row axes shard as the rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from passes import compat


def kv_update_read(pool: Any, layers: Sequence[Any], rows: Any, positions: Any, pages: Any, *, length: int) -> Any:
    """Writes rows and reads a request's pages.

    Args:
      pool: `[*L, P, Z, *row]`, one leading axis for each of `layers`.
      layers: Indices into the leading axes, i32 scalars.
      rows: `[T, *row]`, in the pool's dtype.
      positions: i32 `[T]`; a position of `M * Z` or more is dropped.
      pages: i32 `[M]`, the pages of the request in order.
      length: Number of positions to read, at most `M * Z`.

    Returns: `(view [length, *row], pool)`; unwritten positions of the view hold whatever the pool held.
    """
    view, pool = kv_update_read_p.bind(pool, rows, positions, pages, *layers, length=length)
    return view, pool


def _meaning(pool: Any, rows: Any, positions: Any, pages: Any, *layers: Any, length: int) -> list[Any]:
    lead = len(layers)
    num_pages, page_size = pool.shape[lead], pool.shape[lead + 1]
    row_shape = pool.shape[lead + 2 :]
    inside = (positions >= 0) & (positions < pages.shape[-1] * page_size)
    slot = jnp.clip(positions // page_size, 0, pages.shape[-1] - 1)
    page = jnp.where(inside, jnp.take_along_axis(pages, slot, axis=-1), num_pages)
    pool = pool.at[(*layers, page, positions % page_size)].set(rows, mode="drop")
    view = pool[(*layers, pages)]
    view = view.reshape(*pages.shape[:-1], pages.shape[-1] * page_size, *row_shape)
    return [view[..., :length, *[slice(None)] * len(row_shape)], pool]


def _abstract(pool: Any, rows: Any, positions: Any, pages: Any, *layers: Any, length: int) -> list[Any]:
    row_shape = pool.shape[len(layers) + 2 :]
    batch = pages.shape[:-1]
    if tuple(rows.shape) != (*batch, positions.shape[-1], *row_shape):
        raise ValueError(f"rows must be {(*batch, positions.shape[-1], *row_shape)}, got {tuple(rows.shape)}")
    return [compat.shaped((*batch, length, *row_shape), pool.dtype), compat.shaped(pool.shape, pool.dtype)]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, length: int) -> Any:
    pool, rows, positions, pages, *layers = args
    if dims[0] is not None or any(d is not None for d in dims[4:]):
        raise NotImplementedError("kv_update_read maps over requests only: the pool and layer indices are shared")
    if pages.ndim - (dims[3] is not None) != 1:
        raise NotImplementedError("kv_update_read maps over requests once")
    size = next(x.shape[d] for x, d in zip(args[1:4], dims[1:4], strict=True) if d is not None)
    mapped = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[1:4], dims[1:4], strict=True)
    ]
    out = kv_update_read_p.bind(pool, *mapped, *layers, length=length)
    return out, [0, None]


kv_update_read_p = compat.make_primitive("kv_update_read", _meaning, _abstract, _batch)
