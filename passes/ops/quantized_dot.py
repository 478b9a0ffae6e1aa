"""`quantized_dot`: a product with weights that are stored quantized, as one operation.

Meaning, for weights `w[o, k] = unpack(qvalue)[o, k] * scale[o, k // G]`:

    y[..., o] = sum over k of x[..., k] * w[o, k]

Activations are rounded first where the scheme says so, each token with a scale of its own; with one scale a channel
the sum then runs over the small numbers (int32, or float32 for float8), and the scales are applied to it. With
`origin`, the float weights that were quantized, the gradient is straight-through: that of a product with the rounded
operands, what reaches a rounded operand reaches what was rounded. FLOPs: two a weight and row. Bytes: weights as
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import compat
from passes.quantization import schemes
from passes.quantization.packing import Packing
from passes.quantization.schemes import Scheme


def quantized_dot(
    x: Any,
    qvalue: Any,
    scale: Any,
    origin: Any = None,
    *,
    scheme: Scheme,
    packing: Packing,
    num_batch: int = 0,
    precision: Any = None,
    dtype: Any = None,
) -> Any:
    """The product of `x` with quantized weights.

    Args:
      x: `[*batch, ..., K]`, floats.
      qvalue: `[*batch, O, K]` as `packing` stores it.
      scale: `[*batch, O, C]`.
      origin: What was quantized, `[*batch, O, K]`; only gradients look at it.
      num_batch: Number of leading axes that `x` and the weights share.
      dtype: Of the result; by default that of `x`.

    Returns: `[*batch, ..., O]`.
    """
    operands = [x, qvalue, scale] if origin is None else [x, qvalue, scale, origin]
    (out,) = quantized_dot_p.bind(
        *operands,
        scheme=scheme,
        packing=packing,
        num_batch=num_batch,
        precision=precision,
        preferred_element_type=jnp.dtype(dtype or x.dtype),
    )
    return out


@dataclass(frozen=True)
class _How:
    """The parameters of one product."""

    scheme: Scheme
    packing: Packing
    num_batch: int
    precision: Any
    dtype: Any

    def dot(self, x: Any, weight: Any, dtype: Any) -> Any:
        """`[*batch, ..., K] x [*batch, O, K]`."""
        batch = tuple(range(self.num_batch))
        dimensions = (((x.ndim - 1,), (weight.ndim - 1,)), (batch, batch))
        return lax.dot_general(x, weight, dimensions, precision=self.precision, preferred_element_type=dtype)

    def beside_rows(self, scale: Any, rank: int) -> Any:
        """Scales `[*batch, O]` so that they fit a result of `rank` dimensions."""
        batch = scale.shape[: self.num_batch]
        return scale.astype(jnp.float32).reshape(*batch, *[1] * (rank - self.num_batch - 1), scale.shape[-1])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(how: _How, x: Any, qvalue: Any, scale: Any, origin: Any) -> Any:
    scheme, rank = how.scheme, x.ndim
    number = how.packing.unpack(qvalue, scheme, x.shape[-1])
    if scheme.group_size is not None:
        x = _rounded_tokens(x, scheme)
        weight = schemes.dequantize(number, scale, scheme)
        weight = weight.astype(x.dtype) if scheme.activation is None else weight
        out = how.dot(x, weight, jnp.float32)
    elif scheme.activation is None:
        out = how.dot(x, number.astype(x.dtype), jnp.float32) * how.beside_rows(scale[..., 0], rank)
    else:
        tokens, token_scale = schemes.quantize_tokens(x, scheme.activation)
        accumulator = jnp.float32 if scheme.activation.startswith("float") else jnp.int32
        total = how.dot(tokens, number, accumulator).astype(jnp.float32)
        out = total * token_scale * how.beside_rows(scale[..., 0], rank)
    return out.astype(how.dtype)


def _rounded_tokens(x: Any, scheme: Scheme) -> Any:
    """The activations as the product sees them."""
    if scheme.activation is None:
        return x
    return schemes.dequantize(*schemes.quantize_tokens(x, scheme.activation), schemes.Scheme("", scheme.activation))


@_product.defjvp
def _product_jvp(how: _How, primals: Any, tangents: Any) -> Any:
    x, qvalue, scale, origin = primals
    dx, _, _, dorigin = tangents
    number = how.packing.unpack(qvalue, how.scheme, x.shape[-1])
    weight = schemes.dequantize(number, scale, how.scheme).astype(x.dtype)
    tangent = how.dot(dx, weight, how.dtype)
    if origin is not None:
        tokens = _rounded_tokens(x, how.scheme).astype(x.dtype)
        tangent = tangent + how.dot(tokens, dorigin.astype(x.dtype), how.dtype)
    return _product(how, *primals), tangent


def _meaning(
    x: Any,
    qvalue: Any,
    scale: Any,
    origin: Any = None,
    *,
    scheme: Scheme,
    packing: Packing,
    num_batch: int,
    precision: Any,
    preferred_element_type: Any,
) -> list[Any]:
    return [_product(_How(scheme, packing, num_batch, precision, preferred_element_type), x, qvalue, scale, origin)]


def _abstract(
    x: Any, qvalue: Any, scale: Any, *origin: Any, scheme: Scheme, num_batch: int, preferred_element_type: Any, **_: Any
) -> list[Any]:
    batch, size = x.shape[:num_batch], x.shape[-1]
    want = (*batch, qvalue.shape[-2] if len(qvalue.shape) > 1 else 0, scheme.num_groups(size))
    if tuple(scale.shape) != want or tuple(qvalue.shape[:-1]) != want[:-1]:
        raise ValueError(f"x {x.shape} needs scales of {want}, got {scale.shape} for weights {qvalue.shape}")
    return [compat.shaped((*x.shape[:-1], want[-2]), preferred_element_type)]


quantized_dot_p = compat.derive_rules(compat.make_primitive("quantized_dot", _meaning, _abstract))
