"""`dequantize`: floats from stored weights and their scales, as one operation; a look-up does it to the rows it took.

Meaning: `unpack(qvalue) * scale`, cast. With `origin`, the float weights that were quantized, it has the
straight-through gradient: what reaches the result reaches them. FLOPs: two a weight. Bytes: as stored, and the result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from passes import compat
from passes.quantization import schemes
from passes.quantization.packing import Packing
from passes.quantization.schemes import Scheme


def dequantize(
    qvalue: Any, scale: Any, origin: Any = None, *, scheme: Scheme, packing: Packing, size: int, dtype: Any
) -> Any:
    """Weights `[*B, size]` in `dtype`.

    Args:
      qvalue: As `packing` stores them, `[*B, ...]`.
      scale: `[*B, C]`.
      origin: What was quantized, `[*B, size]`; only gradients look at it.
    """
    operands = [qvalue, scale] if origin is None else [qvalue, scale, origin]
    (out,) = dequantize_p.bind(*operands, scheme=scheme, packing=packing, size=size, dtype=jax.numpy.dtype(dtype))
    return out


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _floats(scheme: Scheme, packing: Packing, size: int, dtype: Any, qvalue: Any, scale: Any, origin: Any) -> Any:
    return schemes.dequantize(packing.unpack(qvalue, scheme, size), scale, scheme).astype(dtype)


@_floats.defjvp
def _floats_jvp(scheme, packing, size, dtype, primals, tangents):
    out = _floats(scheme, packing, size, dtype, *primals)
    if primals[2] is None:
        return out, jax.numpy.zeros_like(out)
    return out, tangents[2].astype(dtype)


def _meaning(
    qvalue: Any, scale: Any, origin: Any = None, *, scheme: Scheme, packing: Packing, size: int, dtype: Any
) -> list[Any]:
    return [_floats(scheme, packing, size, dtype, qvalue, scale, origin)]


def _abstract(qvalue: Any, scale: Any, *origin: Any, scheme: Scheme, packing: Packing, size: int, dtype: Any) -> list:
    if scale.shape != (*qvalue.shape[:-1], scheme.num_groups(size)):
        raise ValueError(f"scale must be {(*qvalue.shape[:-1], scheme.num_groups(size))}, got {scale.shape}")
    return [compat.shaped((*scale.shape[:-1], size), dtype)]


dequantize_p = compat.derive_rules(compat.make_primitive("dequantize", _meaning, _abstract))
