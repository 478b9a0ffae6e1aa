"""Weights on disk: safetensors whose every tensor begins at a multiple of 64 bytes, written as a stream and mapped.

The one idea: XLA takes an aligned piece of a mapped file as an array as it is, so that loading copies nothing and
memory holds what the steps touch. The gaps that alignment leaves are tensors of their own, since the format allows no
holes.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from fastgpt_jax.artifact.digests import PieceDigester
from fastgpt_jax.artifact.executable import Placement, Spec
from fastgpt_jax.artifact.manifest import FileRecord, WeightRecord

ALIGNMENT_BYTES = 64
MAX_FILE_BYTES = 4 * 2**30
_COPY_BYTES = 16 * 2**20
_SAFETENSORS_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
    }
)
"""Dtypes that the format has a name for; others are written as bytes, and the manifest says what they are."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight to be written; `read` makes its values when their turn comes, so that few are in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * dtype_of(self.dtype).itemsize


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a name as JAX spells it."""
    return np.dtype(getattr(ml_dtypes, name, name))


def write_weights(
    folder: Path, weights: Sequence[Weight], progress: Callable[[int], None]
) -> tuple[list[WeightRecord], list[FileRecord]]:
    """Writes files of at most 4 GiB (or one weight) into `folder/weights`.

    Args:
      progress: Called with the number of bytes after each weight.
    """
    (folder / "weights").mkdir(exist_ok=True)
    records: list[WeightRecord] = []
    files: list[FileRecord] = []
    for group in _groups(weights):
        path = f"weights/{len(files):05d}.safetensors"
        begins, record = _write_file(folder / path, path, group, progress)
        files.append(record)
        records += [
            WeightRecord(w.name, w.shape, w.dtype, w.spec, path, begin) for w, begin in zip(group, begins, strict=True)
        ]
    return records, files


def map_weights(folder: Path, records: Sequence[WeightRecord], placement: Placement) -> list[Any]:
    """The weights on their devices; on a CPU they are pieces of the mapped files."""
    maps: dict[str, np.ndarray] = {}
    arrays = []
    for record in records:
        if record.file not in maps:
            maps[record.file] = np.asarray(np.memmap(folder / record.file, np.uint8, "r"))
        dtype = dtype_of(record.dtype)
        nbytes = int(np.prod(record.shape, dtype=np.int64)) * dtype.itemsize
        piece = maps[record.file][record.begin : record.begin + nbytes]
        arrays.append(piece.view(dtype).reshape(record.shape))
    return jax.device_put(arrays, [placement.sharding(record.spec) for record in records])


def _groups(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    group: list[Weight] = []
    for weight in weights:
        if group and sum(w.nbytes for w in group) + weight.nbytes > MAX_FILE_BYTES:
            yield group
            group = []
        group.append(weight)
    if group:
        yield group


def _write_file(
    path: Path, name: str, weights: Sequence[Weight], progress: Callable[[int], None]
) -> tuple[list[int], FileRecord]:
    """Writes one file; returns where each weight begins, and the file's record."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, []
    for index, weight in enumerate(weights):
        kind = _SAFETENSORS_NAMES.get(weight.dtype)
        shape = list(weight.shape) if kind else [weight.nbytes]
        end = offset + weight.nbytes
        header[weight.name] = {"dtype": kind or "U8", "shape": shape, "data_offsets": [offset, end]}
        offsets.append(offset)
        if gap := -end % ALIGNMENT_BYTES:
            header[f"__pad{index}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        offset = end + gap
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT_BYTES)
    base = 8 + len(encoded)
    digester, num_bytes = PieceDigester(), 0
    with path.open("wb") as file:

        def write(data: memoryview) -> None:
            file.write(data)
            digester.update(data)

        write(memoryview(struct.pack("<Q", len(encoded)) + encoded))
        for weight in weights:
            values = np.ascontiguousarray(weight.read())
            flat = values.reshape(-1).view(np.uint8).data
            for start in range(0, len(flat), _COPY_BYTES):
                write(flat[start : start + _COPY_BYTES])
            write(memoryview(bytes(-weight.nbytes % ALIGNMENT_BYTES)))
            progress(weight.nbytes)
        num_bytes = file.tell()
    return [base + begin for begin in offsets], FileRecord(name, num_bytes, digester.digests())
