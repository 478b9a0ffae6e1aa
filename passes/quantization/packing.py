"""How quantized weights are stored for a target: `pack` and its inverse `unpack`.

Knows no arithmetic. The one idea: a packing is a value that travels with the operations that read it, so that a target
with storage of its own (panels of a kernel, say) hands over a packing and nothing here has to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import lax

from passes.quantization.schemes import Scheme


@dataclass(frozen=True)
class Packing:
    """A bijection between quantized weights and what is stored of them.

    Invariants: `unpack(pack(q, scheme), scheme, q.shape[-1])` is `q` bit for bit. Leading axes stay, so that rows can
    be taken from what is packed.

    Attributes:
      pack: From `qvalue [*B, K]` and its scheme.
      unpack: From what is stored, the scheme, and K.
    """

    name: str
    pack: Callable[[Any, Scheme], Any]
    unpack: Callable[[Any, Scheme, int], Any]

    def __repr__(self) -> str:
        return f"Packing({self.name})"


def make_packings(packings: Iterable[Packing]) -> Mapping[str, Packing]:
    """A frozen table target -> packing.

    Raises:
      ValueError: two packings are for one target.
    """
    table: dict[str, Packing] = {}
    for packing in packings:
        if packing.name in table:
            raise ValueError(f"packings must be for different targets, got two for {packing.name!r}")
        table[packing.name] = packing
    return MappingProxyType(table)


def _pack_nibbles(qvalue: Any, scheme: Scheme) -> Any:
    """Two int4 a byte, the first in the low nibble; an odd last one stands with a zero. Others as they are."""
    if scheme.bits != 4:
        return qvalue
    if qvalue.shape[-1] % 2:
        qvalue = jnp.pad(qvalue, [(0, 0)] * (qvalue.ndim - 1) + [(0, 1)])
    pairs = lax.bitcast_convert_type(qvalue, jnp.uint8).reshape(*qvalue.shape[:-1], -1, 2)
    return (pairs[..., 0] & jnp.uint8(15)) | (pairs[..., 1] << jnp.uint8(4))


def _unpack_nibbles(packed: Any, scheme: Scheme, size: int) -> Any:
    if scheme.bits != 4:
        return packed
    signed = lax.bitcast_convert_type(packed, jnp.int8)
    low = lax.shift_right_arithmetic(lax.shift_left(signed, jnp.int8(4)), jnp.int8(4))
    high = lax.shift_right_arithmetic(signed, jnp.int8(4))
    return jnp.stack([low, high], axis=-1).reshape(*packed.shape[:-1], -1)[..., :size]


XLA = Packing("xla", _pack_nibbles, _unpack_nibbles)
"""For every platform that XLA compiles for."""

PACKINGS: Mapping[str, Packing] = make_packings([XLA])
