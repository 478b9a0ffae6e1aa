"""Quantization schemes: in which numbers weights and activations are kept, and the arithmetic between them and floats.

Knows no graph and no storage. The one idea: symmetric rounding to nearest along the last axis, so that a scheme is a
dtype, how many neighbours share a scale, and what becomes of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

_LARGEST = {"int4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0}
# The largest rounding error as a share of the group's largest number: half a step of an integer grid; for e4m3, with
# three bits behind the point, half a unit in the last place of the largest binade.
_ROUNDING = {"int4": 1 / 14, "int8": 1 / 254, "float8_e4m3fn": 16 / 448}
# The relative error of a number of a product of random operands: five times the usual one, which is the noise of the
# rounding (int4 in groups of 32 11%, int8 1%, e4m3 2.6%), of both operands where both are rounded.
_BUDGET = {"int4": 0.6, "int8": 0.1, "float8_e4m3fn": 0.25}


@dataclass(frozen=True)
class Scheme:
    """How the operands of a product are quantized.

    Attributes:
      dtype: Of the weights, as JAX spells it: int4, int8 or float8_e4m3fn. Integers lie between -(2^(b-1) - 1) and
        2^(b-1) - 1, so that the range is symmetric.
      group_size: Neighbours along the contracted axis that share a scale, the last group may be short; None for one
        scale an output channel.
      activation: The dtype that activations are rounded to in every step, one scale a token; None leaves them.
      scale_dtype: Of the scales. Values are rounded with the scale as it is stored.
    """

    name: str
    dtype: str
    group_size: int | None = None
    activation: str | None = None
    scale_dtype: str = "float32"

    @property
    def bits(self) -> int:
        """Bits of a stored weight, scales not counted."""
        return 4 if self.dtype == "int4" else 8

    @property
    def rounding_error(self) -> float:
        """No weight moves further than this share of the largest in its group."""
        return _ROUNDING[self.dtype]

    @property
    def budget(self) -> float:
        """The largest relative error of a product of random operands, or of a row that is looked up."""
        return _BUDGET[self.dtype]

    @property
    def of_weights(self) -> Scheme:
        """The scheme as far as weights go: two schemes with the same one store the same numbers."""
        return replace(self, name="", activation=None)

    def num_groups(self, size: int) -> int:
        """How many scales a channel of `size` weights has."""
        return 1 if self.group_size is None else -(-size // self.group_size)

    def nbytes(self, num_channels: int, size: int) -> int:
        """Bytes of the weights and scales of `num_channels` channels of `size` weights."""
        scales = self.num_groups(size) * np.dtype(self.scale_dtype).itemsize
        return num_channels * (-(-size * self.bits // 8) + scales)


_GROUPED = {"dtype": "int4", "group_size": 32, "scale_dtype": "bfloat16"}

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("w8a16", "int8"),
            Scheme("w8a8", "int8", activation="int8"),
            Scheme("w4a16", **_GROUPED),
            Scheme("w4a8", **_GROUPED, activation="int8"),
            Scheme("fp8", "float8_e4m3fn", activation="float8_e4m3fn"),
        )
    }
)


def quantize(weight: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Rounds to nearest: `scale = max|w| / largest` of each group, `qvalue = w / scale`.

    Args:
      weight: Floats `[*B, K]`, grouped along the last axis.

    Returns: `qvalue [*B, K]` (int8 for four bits too; `passes.quantization.packing` stores them) and
      `scale [*B, C]`. A group of zeros has scale 1.
    """
    size = weight.shape[-1]
    grouped = _grouped(weight.astype(jnp.float32), scheme)
    largest = jnp.float32(_LARGEST[scheme.dtype])
    scale = (jnp.max(jnp.abs(grouped), axis=-1) / largest).astype(scheme.scale_dtype)
    scale = jnp.where(scale > 0, scale, jnp.ones((), scale.dtype))
    number = _rounded(grouped / scale.astype(jnp.float32)[..., None], scheme.dtype)
    return number.reshape(*weight.shape[:-1], -1)[..., :size], scale


def dequantize(qvalue: Any, scale: Any, scheme: Scheme) -> Any:
    """`qvalue * scale`, float32 `[*B, K]`."""
    size = qvalue.shape[-1]
    number = _grouped(qvalue.astype(jnp.float32), scheme) * scale.astype(jnp.float32)[..., None]
    return number.reshape(*qvalue.shape[:-1], -1)[..., :size]


def quantize_tokens(x: Any, dtype: str) -> tuple[Any, Any]:
    """Rounds each row of the last axis with a scale of its own.

    Returns: `qvalue [*B, K]` in `dtype` and `scale [*B, 1]`, float32.
    """
    return quantize(x, Scheme("", dtype))


def _grouped(x: Any, scheme: Scheme) -> Any:
    """`[*B, C, G]`, the last group filled with zeros."""
    size = x.shape[-1]
    if scheme.group_size is None:
        return x[..., None, :]
    missing = scheme.num_groups(size) * scheme.group_size - size
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, scheme.group_size)


def _rounded(x: Any, dtype: str) -> Any:
    largest = jnp.float32(_LARGEST[dtype])
    if dtype.startswith("float"):
        return jnp.clip(x, -largest, largest).astype(dtype)
    return jnp.clip(jnp.round(x), -largest, largest).astype(jnp.int8)
