"""Products of activations with weight rows, by the native kernels: float weights, int8 and grouped int4.

Knows no graph and no scheme. The one idea: the kernels read weights as every other reader does, `[O, K]` with K
contiguous and int4 two to a byte, so that nothing is packed for them and one file serves all.

Activations are rounded (`activation="int8"`) as `passes.quantization.schemes.quantize_tokens` is by XLA, which
multiplies by reciprocals: sums over integers are then those of the portable program to the bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.kernels.cpu import library

FLOATS = ("float32", "bfloat16")
MAX_DEPTH = 2**31 // 127**2
"""The longest sum of products of int8 that fits int32."""


def weight_dot(x: Any, w: Any, *, out_dtype: Any = None) -> Any:
    """`x [..., K] @ w [O, K].T`, both float32 or bfloat16, summed in float32.

    Returns: `[..., O]` in `out_dtype`, by default that of `x`.
    """
    _check(_odd_operands(x, w, FLOATS, x.shape[-1] if x.shape else 0))
    return _call("weight_dot", x, w, rows=w.shape[0], out_dtype=out_dtype)


def int8_dot(x: Any, qvalue: Any, scale: Any, *, activation: str | None, out_dtype: Any = None) -> Any:
    """`x [..., K] @ (qvalue [O, K] * scale [O, 1]).T`.

    Args:
      qvalue: int8.
      scale: float32, `[O, 1]` or `[O]`.
      activation: "int8" rounds each token of `x` with a scale of its own; None leaves them.

    Returns: `[..., O]` in `out_dtype`, by default that of `x`.
    """
    _check(int8_dot_refusal(x, qvalue, scale, activation=activation))
    rounded = np.bool_(activation == "int8")
    return _call("int8_dot", x, qvalue, scale, rows=qvalue.shape[0], out_dtype=out_dtype, is_activation_rounded=rounded)


def int4_dot(x: Any, packed: Any, scale: Any, *, group_size: int, activation: str | None, out_dtype: Any = None) -> Any:
    """`x [..., K] @ w.T` for weights of four bits, `w[o, k] = nibble[o, k] * scale[o, k // group_size]`.

    Args:
      packed: uint8 `[O, ceil(K / 2)]`, two's complement, number `2 i` in the low half of byte `i`.
      scale: bfloat16 `[O, ceil(K / group_size)]`; the last group may be short.
      group_size: A multiple of 32.
      activation: "int8" rounds each token of `x` with a scale of its own; None leaves them.

    Returns: `[..., O]` in `out_dtype`, by default that of `x`.
    """
    _check(int4_dot_refusal(x, packed, scale, group_size=group_size, activation=activation))
    return _call(
        "int4_dot",
        x,
        packed,
        scale,
        rows=packed.shape[0],
        out_dtype=out_dtype,
        group_size=np.int64(group_size),
        is_activation_rounded=np.bool_(activation == "int8"),
    )


def weight_dot_refusal(depth: int, rows: int, x_dtype: Any, w_dtype: Any) -> str | None:
    """Why `weight_dot` declines `[..., depth]` and `[rows, depth]` of these dtypes; None where it takes them."""
    x, w = jax.ShapeDtypeStruct((depth,), x_dtype), jax.ShapeDtypeStruct((rows, depth), w_dtype)
    return _odd_operands(x, w, FLOATS, depth)


def int8_dot_refusal(x: Any, qvalue: Any, scale: Any, *, activation: str | None) -> str | None:
    """Why `int8_dot` declines these arguments, or their shapes and dtypes; None where it takes them."""
    depth = x.shape[-1] if x.shape else 0
    if reason := _odd_operands(x, qvalue, ("int8",), depth):
        return reason
    if scale.dtype != jnp.float32 or scale.shape not in ((qvalue.shape[0],), (qvalue.shape[0], 1)):
        return f"a float32 scale for each of {qvalue.shape[0]} rows is needed, got {scale.dtype} {scale.shape}"
    return _odd_activation(activation, depth)


def int4_dot_refusal(x: Any, packed: Any, scale: Any, *, group_size: int | None, activation: str | None) -> str | None:
    """Why `int4_dot` declines these arguments, or their shapes and dtypes; None where it takes them."""
    depth = x.shape[-1] if x.shape else 0
    if reason := _odd_operands(x, packed, ("uint8",), -(-depth // 2)):
        return reason
    if group_size is None or group_size < 32 or group_size % 32:
        return f"group_size must be a multiple of 32, got {group_size}"
    want = (packed.shape[0], -(-depth // group_size))
    if scale.dtype != jnp.bfloat16 or scale.shape != want:
        return f"bfloat16 scales {want} are needed, got {scale.dtype} {scale.shape}"
    return _odd_activation(activation, depth)


def _odd_operands(x: Any, w: Any, dtypes: tuple[str, ...], size: int) -> str | None:
    if reason := library.unusable_reason():
        return reason
    if str(x.dtype) not in FLOATS:
        return f"activations must be float32 or bfloat16, got {x.dtype}"
    if len(x.shape) < 1 or len(w.shape) != 2:
        return f"x [..., K] and weights [O, K] are needed, got {x.shape} and {w.shape}"
    if str(w.dtype) not in dtypes or w.shape[1] != size:
        return f"weights must be {' or '.join(dtypes)} [O, {size}] for x {x.shape}, got {w.dtype} {w.shape}"
    return None


def _odd_activation(activation: str | None, depth: int) -> str | None:
    if activation not in (None, "int8"):
        return f"activations are rounded to int8 or not at all, got {activation!r}"
    if activation == "int8" and depth > MAX_DEPTH:
        return f"sums of int32 hold at most {MAX_DEPTH} products, got {depth}"
    return None


def _check(reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(reason)


def _call(op: str, x: Any, *operands: Any, rows: int, out_dtype: Any, **attributes: Any) -> Any:
    dtype = jnp.dtype(out_dtype or x.dtype)
    if str(dtype) not in FLOATS:
        raise NotImplementedError(f"results are float32 or bfloat16, got {dtype}")
    result = jax.ShapeDtypeStruct((*x.shape[:-1], rows), dtype)
    return jax.ffi.ffi_call(f"fastgpt_{op}", result)(x, *operands, **attributes)
