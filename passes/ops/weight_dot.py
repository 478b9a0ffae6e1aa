"""`weight_dot`: a product with weights that lie in rows, one an output channel, as one operation.

Meaning: `y[*batch, ..., o] = sum over k of x[*batch, ..., k] * rows[*batch, o, k]`. Rows are what kernels read from
memory in one stream, and what a look-up of a tied table takes. FLOPs: two a weight and row of `x`. Bytes: operands and
result. Shard rule: that of the product.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from passes import compat


def weight_dot(x: Any, rows: Any, *, num_batch: int = 0, precision: Any = None, dtype: Any = None) -> Any:
    """The product of `x` with weights in rows.

    Args:
      x: `[*batch, ..., K]`, floats.
      rows: `[*batch, O, K]`, floats.
      num_batch: Number of leading axes that both share.
      dtype: Of the result; by default what the operands promote to.

    Returns: `[*batch, ..., O]`.
    """
    dtype = jnp.promote_types(x.dtype, rows.dtype) if dtype is None else dtype
    (out,) = weight_dot_p.bind(
        x, rows, num_batch=num_batch, precision=precision, preferred_element_type=jnp.dtype(dtype)
    )
    return out


def _meaning(x: Any, rows: Any, *, num_batch: int, precision: Any, preferred_element_type: Any) -> list[Any]:
    batch = tuple(range(num_batch))
    dimensions = (((x.ndim - 1,), (rows.ndim - 1,)), (batch, batch))
    return [lax.dot_general(x, rows, dimensions, precision=precision, preferred_element_type=preferred_element_type)]


def _abstract(x: Any, rows: Any, *, num_batch: int, preferred_element_type: Any, **_: Any) -> list[Any]:
    batch = x.shape[:num_batch]
    if len(rows.shape) != num_batch + 2 or tuple(rows.shape[:num_batch]) != batch or x.shape[-1] != rows.shape[-1]:
        raise ValueError(f"x [*batch, ..., K] needs rows [*batch, O, K], got {x.shape} and {rows.shape}")
    return [compat.shaped((*x.shape[:-1], rows.shape[-2]), preferred_element_type)]


weight_dot_p = compat.derive_rules(compat.make_primitive("weight_dot", _meaning, _abstract))
