"""Which files of a repository make a model, and whether a folder has them all.

The one idea: of everything people upload beside a model (the same weights in other formats, pictures, adapters), only
what loading reads is fetched, and a folder is complete once what it promises is there.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from pathlib import Path

from fastgpt_jax.checkpoint.hub.model_id import ModelId
from fastgpt_jax.checkpoint.tensors import INDEX_FILE, SINGLE_FILE
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import read_json_object

WEIGHTS = (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HASH_CHUNK_BYTES = 1 << 20


def choose_files(names: Iterable[str], model: ModelId) -> list[str]:
    """The files to fetch: safetensors and what belongs to them, or the one GGUF file where there are none.

    Raises:
      UserError: The repository holds no weights that can be loaded, or several GGUF files.
    """
    listed = sorted(names)
    if any(_matches(name, WEIGHTS) for name in listed):
        return [name for name in listed if _matches(name, (*WEIGHTS, *BESIDE_WEIGHTS))]
    gguf = [name for name in listed if name.endswith(".gguf") and "/" not in name]
    if len(gguf) == 1:
        return gguf
    if gguf:
        raise UserError(
            f"{model} holds {len(gguf)} GGUF files ({', '.join(gguf[:3])}, ...); fetch one and name its path"
        )
    raise UserError(f"{model} has neither safetensors nor GGUF files, so it cannot be loaded; convert it first")


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole model; a download that was interrupted has left out some of it."""
    if (folder / INDEX_FILE).exists():
        shards = set(map(str, read_json_object(folder / INDEX_FILE).object("weight_map").values.values()))
        return (folder / "config.json").exists() and all((folder / shard).exists() for shard in shards)
    if (folder / SINGLE_FILE).exists():
        return (folder / "config.json").exists()
    return any(folder.glob("*.gguf"))


def check_sha256(path: Path, expected: str | None, model: ModelId) -> None:
    """Removes a file whose digest is not the one the hub gave.

    Raises:
      UserError: It was not.
    """
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.name} of {model} arrived damaged: its SHA-256 is {digest.hexdigest()[:12]}..., the hub says "
            f"{expected[:12]}...; it was removed, run again to fetch it again"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
