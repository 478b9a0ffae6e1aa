"""Questions about values that are known while compiling: is this a scalar, the same everywhere, equal to that one?

Knows no rewrite. A *splat* is a value all of whose elements are one known scalar, written as a constant of any rank or
as the broadcast of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np

from passes.graph import Value

_LARGE_BYTES = 256


def scalar(value: Value) -> np.ndarray | None:
    """The array of a constant of rank 0, else None."""
    const = value.const
    return const if isinstance(const, np.ndarray) and const.ndim == 0 else None


def splat(value: Value) -> Any | None:
    """The one scalar that every element of `value` is, as a NumPy scalar, else None."""
    if value.op is not None and value.op.name == "broadcast_in_dim":
        value = value.op.operands[0]
    const = value.const
    if not isinstance(const, np.ndarray) or not const.size:
        return None
    first = const.reshape(-1)[0]
    return first if const.size == 1 or _all_are(const, first) else None


def is_splat(value: Value, number: float) -> bool:
    """Whether every element is known to be `number`; the sign of zero counts."""
    one = splat(value)
    if one is None:
        return False
    return bool(one == number and (number != 0 or np.signbit(float(one)) == np.signbit(number)))


def _all_are(const: np.ndarray, one: Any) -> bool:
    """Whether all elements have the bits of `one`; the last is looked at first, which spares most arrays a walk."""
    bits = one.tobytes()
    return const.reshape(-1)[-1].tobytes() == bits and const.tobytes() == bits * const.size


def content_key(const: Any) -> Hashable:
    """A key equal for constants of the same dtype, shape and bits, so that NaNs and signed zeros keep apart."""
    if not isinstance(const, np.ndarray):
        return ("object", id(const))
    data = np.ascontiguousarray(const).tobytes()
    if len(data) > _LARGE_BYTES:
        data = hashlib.blake2b(data, digest_size=32).digest()
    return ("array", str(const.dtype), const.shape, data)
