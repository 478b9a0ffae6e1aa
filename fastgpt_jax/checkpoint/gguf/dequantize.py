"""The tensor types of GGUF, and what the numbers in their blocks mean.

Knows bytes and NumPy, no model. The one idea: a type is a record of one block, read by a structured NumPy dtype, and a
function from many records to float32 at once. Sums and products are taken in float32 in the order of the format's
definition, so that the values are those of llama.cpp, bit for bit.

A block is `scale * q` or `scale * q + offset` (`- offset` in the K types); nibbles of a byte run are its low halves
first, then its high halves. Source: the ggml block formats as the GGUF specification names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

_CHUNK_VALUES = 1 << 16  # unpacked at once, so that what lies between bytes and values stays in a core's cache


@dataclass(frozen=True)
class TensorType:
    """`block` values are stored in one record; `unpack` is None where the record is the value itself."""

    name: str
    record: np.dtype
    block: int = 1
    unpack: Callable[[np.ndarray], np.ndarray] | None = None

    def num_bytes(self, num_values: int) -> int:
        """Bytes of a tensor; its rows are a whole number of blocks."""
        return num_values // self.block * self.record.itemsize

    def decode(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The values of a run of bytes: a view where they are stored plainly, else float32."""
        records = data.view(self.record)
        if self.unpack is None:
            return records.reshape(shape)
        values = np.empty((len(records), self.block), np.float32)
        step = _CHUNK_VALUES // self.block
        for start in range(0, len(records), step):
            chunk = records[start : start + step]
            values[start : start + len(chunk)] = self.unpack(chunk).reshape(len(chunk), self.block)
        return values.reshape(shape)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes to [..., 2n] values of 4 bits: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes to [..., n, 8] bits, lowest first."""
    return np.unpackbits(packed[..., None], axis=-1, bitorder="little")


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _unpack_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _float(blocks["q"]) * _float(blocks["d"])[:, None]


def _unpack_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _float(blocks["d"])[:, None] * (_float(_nibbles(blocks["q"])) - 8)


def _unpack_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _float(blocks["d"])[:, None] * _float(_nibbles(blocks["q"])) + _float(blocks["m"])[:, None]


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    fifth = _bits(blocks["h"]).reshape(-1, 32)
    return _float(_nibbles(blocks["q"]) | fifth << 4)


def _unpack_q5_0(blocks: np.ndarray) -> np.ndarray:
    return _float(blocks["d"])[:, None] * (_five_bits(blocks) - 16)


def _unpack_q5_1(blocks: np.ndarray) -> np.ndarray:
    return _float(blocks["d"])[:, None] * _five_bits(blocks) + _float(blocks["m"])[:, None]


def _scales_and_offsets(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset of each of 8 groups, [n, 8, 1], from 6 bits each in 12 bytes.

    Bytes 0-3 hold the first four scales and 4-7 the first four offsets in their low 6 bits; bytes 8-11 the low halves
    of the other four scales and offsets, whose upper 2 bits are the upper 2 bits of bytes 0-7.
    """
    first, second, third = np.split(blocks["s"], 3, axis=-1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    scale = _float(blocks["d"])[:, None] * _float(scales)
    offset = _float(blocks["m"])[:, None] * _float(offsets)
    return scale[..., None], offset[..., None]


def _unpack_q4_k(blocks: np.ndarray) -> np.ndarray:
    scale, offset = _scales_and_offsets(blocks)
    q = _nibbles(blocks["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scale * _float(q) - offset


def _unpack_q5_k(blocks: np.ndarray) -> np.ndarray:
    """Bit `g` of the 32 bytes of `h` is the fifth bit of the 32 values of group `g`."""
    scale, offset = _scales_and_offsets(blocks)
    q = _nibbles(blocks["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = _bits(blocks["h"]).swapaxes(1, 2)
    return scale * _float(q | fifth << 4) - offset


def _unpack_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Two halves of 128 values; of each, `q` holds the low 4 bits and `h` the high 2, 32 values at a time."""
    low = _nibbles(blocks["q"].reshape(-1, 2, 64))
    high = blocks["h"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = _float(low | high.reshape(-1, 2, 128) << 4) - 32
    scale = _float(blocks["d"])[:, None] * _float(blocks["s"])
    return scale[..., None] * q.reshape(-1, 16, 16)


def _record(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


_D, _M = ("d", "<f2"), ("m", "<f2")

TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", np.dtype("<f4")),
        1: TensorType("F16", np.dtype("<f2")),
        2: TensorType("Q4_0", _record(_D, ("q", "u1", 16)), 32, _unpack_q4_0),
        3: TensorType("Q4_1", _record(_D, _M, ("q", "u1", 16)), 32, _unpack_q4_1),
        6: TensorType("Q5_0", _record(_D, ("h", "u1", 4), ("q", "u1", 16)), 32, _unpack_q5_0),
        7: TensorType("Q5_1", _record(_D, _M, ("h", "u1", 4), ("q", "u1", 16)), 32, _unpack_q5_1),
        8: TensorType("Q8_0", _record(_D, ("q", "i1", 32)), 32, _unpack_q8_0),
        12: TensorType("Q4_K", _record(_D, _M, ("s", "u1", 12), ("q", "u1", 128)), 256, _unpack_q4_k),
        13: TensorType("Q5_K", _record(_D, _M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), 256, _unpack_q5_k),
        14: TensorType("Q6_K", _record(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _D), 256, _unpack_q6_k),
        30: TensorType("BF16", np.dtype(ml_dtypes.bfloat16)),
    }
)
# Names of the types that are told apart only to be refused.
OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {
        9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
        20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
        29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    }
)  # fmt: skip
