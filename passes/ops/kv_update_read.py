"""`kv_update_read`: writes new rows into a paged pool, then reads rows of a request, as one operation.

Write-then-read lets XLA update a donated pool in place (read-then-write makes it copy the pool), and the operation's
own batching rule keeps the pool unbatched when a step is mapped over requests. Meaning, for one request:

    pool[layer, pages[p // Z], p % Z] = rows[i]    for each i, p = positions[i]; positions outside are dropped
    view[s] = pool[layer, pages[s // Z], s % Z]    for s < length; all requests write before any reads
    view[s] = pool[layer, pages[r // Z], r % Z]    with `reads`, r = reads[s]; positions outside are the nearest inside

Without new rows it reads, and the pool comes out as it was. FLOPs: 0. Bytes: rows written and view read. Shard rule:
the row axes shard as the rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from passes import compat


def kv_update_read(
    pool: Any,
    layers: Sequence[Any],
    rows: Any,
    positions: Any,
    pages: Any,
    *,
    length: int | None = None,
    reads: Any | None = None,
) -> Any:
    """Writes rows and reads some of a request's; exactly one of `length` and `reads` is given.

    Args:
      pool: `[*L, P, Z, *row]`, one leading axis for each of `layers`.
      layers: Indices into the leading axes, i32 scalars.
      rows: `[T, *row]`, in the pool's dtype; T may be 0.
      positions: i32 `[T]`; a position of `M * Z` or more is dropped.
      pages: i32 `[M]`, the pages of the request in order.
      length: Number of positions to read from the first on, at most `M * Z`.
      reads: i32 `[S]`, the positions to read.

    Returns: `(view [length or S, *row], pool)`; unwritten positions of the view hold whatever the pool held.
    """
    if (length is None) == (reads is None):
        raise ValueError("kv_update_read reads a length or positions, got both or neither")
    read = [] if reads is None else [reads]
    view, pool = kv_update_read_p.bind(pool, rows, positions, pages, *read, *layers, length=length)
    return view, pool


def split_operands(operands: Sequence[Any], length: int | None) -> tuple[Any, Sequence[Any]]:
    """`reads` or None, and `layers`, from the operands of the operation."""
    return (operands[4], operands[5:]) if length is None else (None, operands[4:])


def _meaning(pool: Any, rows: Any, positions: Any, pages: Any, *rest: Any, length: int | None) -> list[Any]:
    reads, layers = split_operands((pool, rows, positions, pages, *rest), length)
    if positions.shape[-1]:
        pool = _written(pool, rows, positions, pages, layers)
    row_shape, page_size = pool.shape[len(layers) + 2 :], pool.shape[len(layers) + 1]
    if reads is not None:
        reads = jnp.clip(reads, 0, pages.shape[-1] * page_size - 1)
        page = jnp.take_along_axis(pages, reads // page_size, axis=-1)
        return [pool[(*layers, page, reads % page_size)], pool]
    view = pool[(*layers, pages)]
    view = view.reshape(*pages.shape[:-1], pages.shape[-1] * page_size, *row_shape)
    return [view[..., :length, *[slice(None)] * len(row_shape)], pool]


def _written(pool: Any, rows: Any, positions: Any, pages: Any, layers: Sequence[Any]) -> Any:
    num_pages, page_size = pool.shape[len(layers)], pool.shape[len(layers) + 1]
    inside = (positions >= 0) & (positions < pages.shape[-1] * page_size)
    slot = jnp.clip(positions // page_size, 0, pages.shape[-1] - 1)
    page = jnp.where(inside, jnp.take_along_axis(pages, slot, axis=-1), num_pages)
    return pool.at[(*layers, page, positions % page_size)].set(rows, mode="drop")


def _abstract(pool: Any, rows: Any, positions: Any, pages: Any, *rest: Any, length: int | None) -> list[Any]:
    reads, layers = split_operands((pool, rows, positions, pages, *rest), length)
    row_shape = pool.shape[len(layers) + 2 :]
    batch = pages.shape[:-1]
    if tuple(rows.shape) != (*batch, positions.shape[-1], *row_shape):
        raise ValueError(f"rows must be {(*batch, positions.shape[-1], *row_shape)}, got {tuple(rows.shape)}")
    if reads is not None and tuple(reads.shape[:-1]) != batch:
        raise ValueError(f"reads must be {batch} and one axis more, got {tuple(reads.shape)}")
    num_read: Any = length if reads is None else reads.shape[-1]
    return [compat.shaped((*batch, num_read, *row_shape), pool.dtype), compat.shaped(pool.shape, pool.dtype)]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, length: int | None) -> Any:
    num = 4 if length is not None else 5  # operands that may differ between requests, the pool among them
    pool, layers = args[0], args[num:]
    if dims[0] is not None or any(d is not None for d in dims[num:]):
        raise NotImplementedError("kv_update_read maps over requests only: the pool and layer indices are shared")
    if args[3].ndim - (dims[3] is not None) != 1:
        raise NotImplementedError("kv_update_read maps over requests once")
    size = next(x.shape[d] for x, d in zip(args[1:num], dims[1:num], strict=True) if d is not None)
    mapped = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[1:num], dims[1:num], strict=True)
    ]
    out = kv_update_read_p.bind(pool, *mapped, *layers, length=length)
    return out, [0, None]


kv_update_read_p = compat.make_primitive("kv_update_read", _meaning, _abstract, _batch)
