"""`rms_norm` and `layer_norm`: normalisation over the last axis, as one operation each.

Meaning, for a row x of D numbers (arXiv:1910.07467, arXiv:1607.06450), statistics in float32 or wider:

    rms_norm:    x / (sqrt(mean(x^2) + eps) + outer_eps) * weight
    layer_norm:  (x - mean(x)) / (sqrt(mean((x - mean(x))^2) + eps) + outer_eps) * weight + bias

FLOPs: about 4 or 7 a number. Bytes: input, weight and result once, where a kernel is selected. Shard rule: every axis
but the last; rows are whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import compat


def rms_norm(x: Any, weight: Any | None = None, *, eps: float, outer_eps: float = 0.0, dtype: Any = None) -> Any:
    """Divides rows by the root of their mean square.

    Args:
      x: `[..., D]`.
      weight: `[D]`.
      dtype: Of the result; by default that of `x`.
    """
    operands = [x] if weight is None else [x, weight]
    return rms_norm_p.bind(*operands, eps=eps, outer_eps=outer_eps, dtype=np.dtype(x.dtype if dtype is None else dtype))


def layer_norm(
    x: Any,
    weight: Any | None = None,
    bias: Any | None = None,
    *,
    eps: float,
    outer_eps: float = 0.0,
    dtype: Any = None,
) -> Any:
    """Takes the mean from rows and divides them by their standard deviation.

    Args:
      x: `[..., D]`.
      weight, bias: `[D]`.
      dtype: Of the result; by default that of `x`.
    """
    extra = [v for v in (weight, bias) if v is not None]
    return layer_norm_p.bind(
        x,
        *extra,
        eps=eps,
        outer_eps=outer_eps,
        dtype=np.dtype(x.dtype if dtype is None else dtype),
        has_weight=weight is not None,
        has_bias=bias is not None,
    )


def wide(x: Any) -> Any:
    """Floats in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def along_rows(v: Any, x: Any) -> Any:
    """`[D]` in the dtype and rank of `x`."""
    return jnp.reshape(v.astype(x.dtype), (1,) * (x.ndim - 1) + (-1,))


def inverse_root(square: Any, eps: float, outer_eps: float) -> Any:
    """`1 / (sqrt(square + eps) + outer_eps)`."""
    if outer_eps:
        return 1.0 / (jnp.sqrt(square + eps) + outer_eps)
    return jax.lax.rsqrt(square + eps)


def _rms_meaning(x: Any, weight: Any | None = None, *, eps: float, outer_eps: float, dtype: Any) -> Any:
    x = wide(x)
    x = x * inverse_root(jnp.mean(jnp.square(x), axis=-1, keepdims=True), eps, outer_eps)
    return (x if weight is None else x * along_rows(weight, x)).astype(dtype)


def _layer_meaning(
    x: Any, *extra: Any, eps: float, outer_eps: float, dtype: Any, has_weight: bool, has_bias: bool
) -> Any:
    x = wide(x)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * inverse_root(jnp.mean(jnp.square(x), axis=-1, keepdims=True), eps, outer_eps)
    if has_weight:
        x = x * along_rows(extra[0], x)
    if has_bias:
        x = x + along_rows(extra[-1], x)
    return x.astype(dtype)


def _abstract(x: Any, *extra: Any, dtype: Any, **params: Any) -> Any:
    for vector in extra:
        if tuple(vector.shape) != x.shape[-1:]:
            raise ValueError(f"a norm over rows of {x.shape[-1]} takes vectors of as many, got {tuple(vector.shape)}")
    return compat.shaped(x.shape, dtype)


rms_norm_p = compat.derive_rules(compat.make_primitive("rms_norm", _rms_meaning, _abstract, multiple_results=False))
layer_norm_p = compat.derive_rules(
    compat.make_primitive("layer_norm", _layer_meaning, _abstract, multiple_results=False)
)
