"""The GGUF format: a header, metadata by name, the places of the tensors, and their bytes, in one mapped file.

Knows no model. The one idea: everything before the tensors is read and checked once against the size of the file, so
that a tensor read later cannot run past its end; a tensor's bytes are touched when it is asked for.

Source: docs/gguf.md of github.com/ggml-org/ggml, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from fastgpt_jax.checkpoint.gguf.dequantize import OTHER_TYPES, TENSOR_TYPES, TensorType
from fastgpt_jax.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS: Mapping[int, np.dtype] = MappingProxyType(
    {
        kind: np.dtype(f"<{code}")
        for kind, code in {
            0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8",
        }.items()
    }
)  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies. `shape` is row-major, outermost dimension first; `begin` counts bytes from the file's."""

    type: TensorType
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class GGUFFile:
    """One mapped file. Invariants: every tensor is of a known type and lies within the file."""

    def __init__(self, path: Path):
        """Reads metadata and places.

        Raises:
          UserError: It cannot be read, is not GGUF, is big-endian, truncated, or holds a type that is not supported.
        """
        self.path = path
        _check_beginning(path)
        cursor = _Cursor(path)
        num_tensors, num_fields = cursor.integer("<Q"), cursor.integer("<Q")
        fields = {}
        for _ in range(num_fields):
            name = cursor.string()
            fields[name] = cursor.value()
        self.metadata: Mapping[str, Any] = MappingProxyType(fields)
        described = [(cursor.string(), *cursor.tensor()) for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            cursor.fail(f"its general.alignment must be a positive integer, not {alignment!r}")
        base = cursor.position + -cursor.position % alignment
        places = {name: self._place(name, shape, kind, base + offset) for name, shape, kind, offset in described}
        self.tensors: Mapping[str, TensorPlace] = MappingProxyType(places)
        self._data = cursor.data
        end = max((place.begin + place.num_bytes for place in places.values()), default=0)
        if end > len(self._data):
            raise UserError(
                f"{path} is truncated: its tensors need {end:,} bytes, it has {len(self._data):,}; fetch it again"
            )

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor: a read-only view of plain ones, float32 of quantized ones."""
        place = self.tensors[name]
        return place.type.decode(self._data[place.begin : place.begin + place.num_bytes], place.shape)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> TensorPlace:
        tensor_type = TENSOR_TYPES.get(kind)
        if tensor_type is None:
            supported = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise UserError(
                f"{self.path}: tensor {name} is of type {OTHER_TYPES.get(kind, kind)}, which is not supported; take a "
                f"file whose tensors are among {supported}"
            )
        if not shape or shape[-1] % tensor_type.block:
            raise UserError(
                f"{self.path} is damaged: tensor {name} of shape {shape} does not hold whole blocks of "
                f"{tensor_type.block} values, as {tensor_type.name} needs"
            )
        num_values = 1
        for size in shape:
            num_values *= size
        return TensorPlace(tensor_type, shape, begin, tensor_type.num_bytes(num_values))


def _check_beginning(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if start == b"version ":
        raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if start[:4] != _MAGIC:
        raise UserError(f"{path} is not a GGUF file: it begins with {start[:4]!r} and should with {_MAGIC!r}")
    if len(start) < 8:
        raise UserError(f"{path} is truncated: it has {len(start)} bytes; fetch it again")
    version = struct.unpack("<I", start[4:])[0]
    if version in _VERSIONS:
        return
    if struct.unpack(">I", start[4:])[0] in (1, *_VERSIONS):
        raise UserError(f"{path} is a big-endian GGUF file; convert the model again, little-endian")
    raise UserError(
        f"{path} is GGUF version {version}; supported are {' and '.join(map(str, _VERSIONS))}, convert the model again"
    )


class _Cursor:
    """Reads one value after the other; whatever would lie past the end of the file is an error of one line."""

    def __init__(self, path: Path):
        self._path = path
        self.data = np.asarray(np.memmap(path, np.uint8, "r"))
        self._view = self.data.data
        self.position = 8

    def fail(self, what: str) -> NoReturn:
        raise UserError(f"{self._path} is damaged: {what} (at byte {self.position:,}); fetch it again")

    def integer(self, code: str) -> int:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def string(self) -> str:
        # Some vocabularies hold pieces that are no UTF-8 on their own.
        return bytes(self._take(self.integer("<Q"))).decode("utf-8", errors="replace")

    def value(self) -> Any:
        return self._value(self.integer("<I"))

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset from the beginning of the tensors."""
        num_dimensions = self.integer("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            self.fail(f"a tensor has {num_dimensions} dimensions, and {_MAX_DIMENSIONS} is the most")
        sizes = tuple(int(size) for size in self._array(np.dtype("<u8"), num_dimensions))
        return sizes[::-1], self.integer("<I"), self.integer("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._list(self.integer("<I"), self.integer("<Q"))
        if kind in _SCALARS:
            return self._array(_SCALARS[kind], 1)[0].item()
        self.fail(f"a metadata value is of the unknown type {kind}")

    def _list(self, kind: int, length: int) -> list[Any]:
        if kind in _SCALARS:
            return self._array(_SCALARS[kind], length).tolist()
        if kind == _ARRAY:
            self.fail("an array holds arrays")
        if length > len(self.data):
            self.fail(f"an array claims {length:,} values")
        return self._strings(length) if kind == _STRING else [self._value(kind) for _ in range(length)]

    def _strings(self, length: int) -> list[str]:
        """One loop without calls: vocabularies and their merges are hundreds of thousands of strings."""
        lengths, view, position, found = struct.Struct("<Q"), self._view, self.position, []
        try:
            for _ in range(length):
                (size,) = lengths.unpack_from(view, position)
                position += 8 + size
                found.append(str(view[position - size : position], "utf-8", "replace"))
        except (struct.error, OverflowError):
            position = len(view) + 1
        self._take(position - self.position)
        return found

    def _array(self, dtype: np.dtype, length: int) -> np.ndarray:
        return np.frombuffer(self._take(length * dtype.itemsize), dtype)

    def _take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if end > len(self._view):
            raise UserError(
                f"{self._path} is truncated: its metadata needs {end:,} bytes, it has {len(self.data):,}; "
                "fetch it again"
            )
        taken = self._view[self.position : end]
        self.position = end
        return taken
