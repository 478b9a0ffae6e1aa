"""Norms, gates and rotations in native code: one pass over rows where XLA makes several kernels.

Knows no graph. Floats are float32 or bfloat16, everything is computed in float32. Sources: arXiv:1910.07467,
arXiv:1607.06450, arXiv:2002.05202, arXiv:2104.09864.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu")


def refusal(*dtypes: Any) -> str | None:
    """Why numbers of these dtypes are not taken; None where they are."""
    wrong = next((d for d in dtypes if jnp.dtype(d) not in FLOATS), None)
    return None if wrong is None else f"kernels take float32 and bfloat16, and this is {wrong}"


def norm(
    x: Any,
    y: Any | None = None,
    weight: Any | None = None,
    bias: Any | None = None,
    *,
    eps: float,
    outer_eps: float = 0.0,
    has_mean: bool,
    dtype: Any,
) -> list[Any]:
    """`(total - mean) / (sqrt(variance + eps) + outer_eps) * weight + bias` of `total = x + y`, along the last axis.

    Args:
      x, y: `[..., D]`, of one dtype.
      weight, bias: `[D]`, of one dtype.
      has_mean: Whether the mean is taken off; else it counts as 0, and the variance is the mean square.
      dtype: Of the norm.

    Returns: The norm, and the sum in the dtype of `x` where there is a `y`.
    """
    given = [v for v in (x, y, weight, bias) if v is not None]
    results = [jax.ShapeDtypeStruct(x.shape, dtype)]
    if y is not None:
        results.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    return list(
        jax.ffi.ffi_call("fastgpt_norm", results)(
            *given,
            eps=np.float32(eps),
            outer_eps=np.float32(outer_eps),
            has_mean=has_mean,
            has_y=y is not None,
            has_weight=weight is not None,
            has_bias=bias is not None,
        )
    )


def gated(gate: Any, up: Any, *, activation: str, dtype: Any) -> Any:
    """`activation(gate) * up`, elementwise; `activation` is one of `ACTIVATIONS`."""
    return jax.ffi.ffi_call("fastgpt_gated", jax.ShapeDtypeStruct(gate.shape, dtype))(gate, up, activation=activation)


def rope(x: Any, cos: Any, sin: Any, *, is_interleaved: bool, dtype: Any) -> Any:
    """Rotates pairs of numbers of the last axis.

    Args:
      x: `[..., H]`.
      cos, sin: `[..., H or H / 2]` of one dtype, other axes as in `x` or of size 1.
      is_interleaved: Whether the two of a pair are neighbours, and not H / 2 apart.
    """
    out = jax.ShapeDtypeStruct(x.shape, dtype)
    return jax.ffi.ffi_call("fastgpt_rope", out)(x, cos, sin, is_interleaved=is_interleaved)
