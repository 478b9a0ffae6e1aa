"""The safetensors format: 8 bytes of header length, a JSON header, the raw tensors.

Knows no model. The one idea: a file is mapped, and a tensor is a read-only view into it, so that reading one leaf pages
in one leaf. Written here rather than taken from `safetensors.numpy` because that knows no bfloat16, and because what is
wrong with a damaged file should be said in the user's words.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from fastgpt_jax.errors import UserError

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # The format's own limit.


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `begin` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One mapped file. Invariant: every entry lies within the file, so that reading cannot run past its end."""

    def __init__(self, path: Path):
        """Reads the header alone.

        Raises:
          UserError: The file is missing, truncated, or not safetensors.
        """
        self.path = path
        self.entries = _read_header(path)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor; its bytes are read from disk when they are touched."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise UserError(f"{self.path}: tensor {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
        if entry.end - entry.begin != dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64)):
            raise UserError(f"{self.path} is damaged: tensor {name} has {entry.end - entry.begin} bytes for {entry}")
        if entry.begin == entry.end:
            return np.zeros(entry.shape, dtype)
        # np.memmap itself would not map a dtype that NumPy knows from ml_dtypes alone on every version.
        mapped = np.memmap(self.path, np.uint8, "r", entry.begin, entry.end - entry.begin)
        return np.asarray(mapped).view(dtype).reshape(entry.shape)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors in the order given, each row-major and little-endian; the header is padded to 8 bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
            encoded = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if prefix == b"version ":
        raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if length > _MAX_HEADER_BYTES:
        raise UserError(f"{path} is not a safetensors file: it begins with {prefix!r}")
    if size < _LENGTH_BYTES + length or len(prefix) < _LENGTH_BYTES:
        raise UserError(f"{path} is truncated: its header needs {_LENGTH_BYTES + length:,} bytes, it has {size:,}")
    try:
        entries = {
            name: _parse_entry(entry, _LENGTH_BYTES + length)
            for name, entry in json.loads(encoded).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
    needed = max((entry.end for entry in entries.values()), default=0)
    if needed > size:
        raise UserError(f"{path} is truncated: its tensors need {needed:,} bytes, it has {size:,}; copy it again")
    return entries


def _parse_entry(entry: Mapping[str, Any], base: int) -> TensorEntry:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or any(size < 0 for size in shape):
        raise ValueError(f"offsets {begin} to {end}, shape {shape}")
    return TensorEntry(str(entry["dtype"]), shape, base + begin, base + end)
