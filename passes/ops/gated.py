"""`gated`: `activation(gate) * up`, the middle of a gated MLP (arXiv:2002.05202), as one operation.

Meaning: the activation in the dtype that the program has it in, times `up` in that dtype, then cast. An activation has
a name, which a kernel goes by, and a spelling: constants and their rounding differ among them. FLOPs: those of the
activation and one a number. Bytes: both inputs and the result once, where a kernel is selected. Shard rule: every axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes import compat

_ROOT = math.sqrt(2.0 / math.pi)


def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + jnp.exp(-x))


ACTIVATIONS: Mapping[str, tuple[Callable[[Any], Any], ...]] = MappingProxyType(
    {
        "silu": (lambda x: x * lax.logistic(x), lambda x: x * _sigmoid(x), lambda x: x / (1.0 + jnp.exp(-x))),
        "gelu_tanh": (
            lambda x: jax.nn.gelu(x, approximate=True),
            lambda x: 0.5 * x * (1.0 + jnp.tanh(_ROOT * (x + 0.044715 * x**3))),
            lambda x: 0.5 * x * (1.0 + jnp.tanh(_ROOT * (x + 0.044715 * x * x * x))),
            lambda x: 0.5 * x * (1.0 + jnp.tanh(_ROOT * x * (1.0 + 0.044715 * x**2))),
            lambda x: x * lax.logistic(2.0 * _ROOT * (x + 0.044715 * x**3)),
        ),
        "gelu_erf": (
            lambda x: jax.nn.gelu(x, approximate=False),
            lambda x: 0.5 * x * (1.0 + lax.erf(x / math.sqrt(2.0))),
            lambda x: 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5))),
            lambda x: x * (1.0 + lax.erf(x / math.sqrt(2.0))) / 2.0,
        ),
        "relu": (
            lambda x: jax.nn.relu(x),
            lambda x: lax.max(x, jnp.zeros((), x.dtype)),
            lambda x: jnp.where(x > 0, x, jnp.zeros((), x.dtype)),
        ),
    }
)
"""Name -> the function in every spelling that is known."""


def gated(gate: Any, up: Any, *, activation: str, spelling: int = 0, inner_dtype: Any = None, dtype: Any = None) -> Any:
    """Multiplies.

    Args:
      gate, up: Of one shape.
      activation: A name of `ACTIVATIONS`.
      spelling: Which of its functions.
      inner_dtype: In which it is computed; by default that of `gate`.
      dtype: Of the result; by default that of `gate`.
    """
    inner_dtype, dtype = (np.dtype(gate.dtype if d is None else d) for d in (inner_dtype, dtype))
    return gated_p.bind(gate, up, activation=activation, spelling=spelling, inner_dtype=inner_dtype, dtype=dtype)


def _meaning(gate: Any, up: Any, *, activation: str, spelling: int, inner_dtype: Any, dtype: Any) -> Any:
    acted = ACTIVATIONS[activation][spelling](gate.astype(inner_dtype))
    return (acted * up.astype(inner_dtype)).astype(dtype)


def _abstract(gate: Any, up: Any, *, dtype: Any, **params: Any) -> Any:
    if gate.shape != up.shape:
        raise ValueError(f"gated takes two arrays of one shape, got {gate.shape} and {up.shape}")
    return compat.shaped(gate.shape, dtype)


gated_p = compat.derive_rules(compat.make_primitive("gated", _meaning, _abstract, multiple_results=False))
