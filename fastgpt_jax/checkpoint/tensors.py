"""All tensors of a Hugging Face folder by name, whether in one safetensors file or in shards.

Knows no model. The one idea: only headers are read up front; a tensor is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastgpt_jax.checkpoint.safetensors_io import SafetensorsFile
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


@runtime_checkable
class NamedTensors(Protocol):
    """Tensors by Hugging Face's names, whatever file they lie in."""

    @property
    def names(self) -> set[str]: ...

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        ...

    def dtype_name(self, name: str) -> str:
        """The dtype as the file spells it, for messages."""
        ...


class TensorFolder:
    """The tensors of a checkpoint. Invariant: each name lies in exactly one file, whose header holds it."""

    def __init__(self, files: Mapping[str, SafetensorsFile]):
        """Args: files: The file of each tensor, by the tensor's name."""
        self._files = files

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor."""
        return self._files[name].read(name)

    def dtype_name(self, name: str) -> str:
        """The dtype in safetensors' spelling, such as `BF16`."""
        return self._files[name].entries[name].dtype


def open_tensor_folder(folder: Path) -> TensorFolder:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
      UserError: There are no safetensors, a shard is missing or truncated, or the index promises what no shard holds.
    """
    if (folder / INDEX_FILE).exists():
        return TensorFolder(_open_shards(folder))
    if (folder / SINGLE_FILE).exists():
        file = SafetensorsFile(folder / SINGLE_FILE)
        return TensorFolder(dict.fromkeys(file.entries, file))
    others = [name for name in _OTHER_WEIGHTS if (folder / name).exists()]
    hint = f"; {others[0]} is there, convert it to safetensors first" if others else ""
    raise UserError(f"{folder} has no weights: need {SINGLE_FILE}, or {INDEX_FILE} and its shards{hint}")


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    index = read_json_object(folder / INDEX_FILE)
    weight_map: Mapping[str, Any] = index.object("weight_map").values
    if not weight_map:
        raise UserError(f"{index.where} has no weight_map, so no tensor can be found")
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise UserError(f"{index.where} must name files in its own folder, got {shard!r}")
        if not (folder / shard).exists():
            raise UserError(f"{index.where} names the shard {shard}, which is missing; copy it into {folder}")
        shards[shard] = SafetensorsFile(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].entries:
            raise UserError(f"{index.where} promises {name} in {shard}, but that file does not hold it")
    return {name: shards[shard] for name, shard in weight_map.items()}
