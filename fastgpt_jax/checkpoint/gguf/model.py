"""A GGUF file becomes a model with its parameters, tokenizer and defaults.

Knows no serving. The one idea: the file is translated into what a Hugging Face folder would say, tensor by tensor as
each is asked for, so that a quantized file costs the memory of the model and of one leaf.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.checkpoint.gguf.reader import GGUFFile
from fastgpt_jax.checkpoint.gguf.translate import (
    EMBEDDING,
    FREQUENCY_FACTORS,
    FrequencyFactors,
    num_interleaved_heads,
    translate_config,
    translate_name,
    undo_interleaving,
)
from fastgpt_jax.checkpoint.huggingface import DTYPES, LoadedModel
from fastgpt_jax.checkpoint.parameters import load_module
from fastgpt_jax.checkpoint.registry import find_family
from fastgpt_jax.checkpoint.rope import rope_notes
from fastgpt_jax.checkpoint.tensors import INDEX_FILE, SINGLE_FILE
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.tokenizer.gguf import make_gguf_tokenizer
from fastgpt_jax.tokenizer.tokenizer import Tokenizer

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFTensors:
    """The tensors of a model by Hugging Face's names, in its order of rows."""

    def __init__(self, files: Mapping[str, GGUFFile], config: Fields):
        """Args: files: The file of each tensor, by the file's own name for it."""
        self._files = files
        self._config = config
        self._own_names = {translate_name(name): name for name in files if name != FREQUENCY_FACTORS}

    @property
    def names(self) -> set[str]:
        return set(self._own_names)

    def read(self, name: str) -> np.ndarray:
        """One tensor; dequantized to float32 where it is quantized."""
        own_name = self._own_names[name]
        values = self._files[own_name].read(own_name)
        num_heads = num_interleaved_heads(own_name, self._config)
        return values if num_heads is None else undo_interleaving(values, num_heads)

    def dtype_name(self, name: str) -> str:
        """The type in GGUF's spelling, such as `Q4_K`."""
        own_name = self._own_names[name]
        return self._files[own_name].tensors[own_name].type.name


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that this path means: itself, or the only one in a folder without safetensors; else None.

    Raises:
      UserError: The folder holds several, or a file of that kind is named that is not there.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if path.suffix == SUFFIX and not path.exists():
        raise UserError(f"no such file: {path}")
    if not path.is_dir() or any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    found = sorted(entry for entry in path.iterdir() if entry.suffix == SUFFIX)
    # The first part of a model in several files speaks for all.
    found = [entry for entry in found if (part := _PART.fullmatch(entry.name)) is None or int(part["number"]) == 1]
    if len(found) > 1:
        listed = ", ".join(entry.name for entry in found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{path} holds {len(found)} GGUF files ({listed}); name one of them")
    return found[0] if found else None


def load_gguf(path: Path, *, dtype: str | None = None, max_model_len: int | None = None) -> LoadedModel:
    """Loads a model of the architecture `llama` or `qwen2`.

    Args:
      path: The file; of a model in several parts, the first.
      dtype: `float32`, `bfloat16` or `float16`; None for that of the file's matrices, and `bfloat16` where they are
        quantized.
      max_model_len: The longest text that will be served, in tokens; None for the model's own limit.

    Raises:
      UserError: The file is damaged, or holds something that is not supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    first, files = _open_parts(path)
    if EMBEDDING not in files:
        raise UserError(f"{path} has no tensor {EMBEDDING}; it holds a vocabulary alone, or no language model")
    metadata = Fields(first.metadata, str(path))
    raw = translate_config(metadata, files[EMBEDDING].tensors[EMBEDDING].shape[0], files)
    family = find_family(raw)
    config = family.parse_config(raw, dtype or _choose_dtype(files), max_model_len)
    if FREQUENCY_FACTORS in files:
        config = _with_factors(config, files[FREQUENCY_FACTORS].read(FREQUENCY_FACTORS), str(path))
    tokenizer = make_gguf_tokenizer(metadata)
    return _assemble(path, family, config, GGUFTensors(files, raw), tokenizer, metadata, max_model_len)


def _assemble(
    path: Path,
    family: Family,
    config: Any,
    tensors: GGUFTensors,
    tokenizer: Tokenizer | None,
    metadata: Fields,
    max_model_len: int | None,
) -> LoadedModel:
    own_limit = config.max_position_embeddings
    pad_token_ids = metadata.token_ids("tokenizer.ggml.padding_token_id")
    return LoadedModel(
        model=load_module(family, config, tensors, str(path)),
        config=config,
        name=path.stem,
        tokenizer=tokenizer,
        generation=GenerationDefaults(
            min(own_limit, max_model_len or own_limit),
            () if tokenizer is None else tokenizer.eos_token_ids,
            None if tokenizer is None else tokenizer.bos_token_id,
            pad_token_ids[0] if pad_token_ids else None,
        ),
        chat_template=metadata.string("tokenizer.chat_template", None),
        vocab_size=config.vocab_size,
        notes=rope_notes(config.rope_scaling),
    )


def _open_parts(path: Path) -> tuple[GGUFFile, dict[str, GGUFFile]]:
    """The file, or all parts of the model that it is the first part of; the first one's metadata are the model's."""
    first = GGUFFile(path)
    parts = [first]
    count = first.metadata.get("split.count", 0)
    if count > 1:
        named = _PART.fullmatch(path.name)
        if named is None or first.metadata.get("split.no") != 0:
            raise UserError(f"{path} is one of {count} parts; name the first, as in NAME-00001-of-{count:05}.gguf")
        names = [f"{named['stem']}-{number:05}-of-{count:05}.gguf" for number in range(2, count + 1)]
        missing = [name for name in names if not (path.parent / name).exists()]
        if missing:
            raise UserError(f"{path} is one of {count} parts, and {missing[0]} is missing; copy it into {path.parent}")
        parts += [GGUFFile(path.parent / name) for name in names]
    return first, {name: part for part in parts for name in part.tensors}


def _choose_dtype(files: Mapping[str, GGUFFile]) -> str:
    """The narrowest dtype that holds every matrix exactly, and bfloat16 where none of the three does."""
    types = {file.tensors[name].type.name for name, file in files.items() if len(file.tensors[name].shape) > 1}
    exact = {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16", frozenset({"BF16"}): "bfloat16"}
    if types <= {"F32", "F16", "BF16"}:
        return exact.get(frozenset(types), "float32")
    return "bfloat16"


def _with_factors(config: Any, factors: np.ndarray, where: str) -> Any:
    """The configuration with the frequencies that the file lists; they include what `rope_scaling` would do."""
    if factors.shape != (config.head_dim // 2,) or not (factors > 0).all():
        raise UserError(
            f"{where} is damaged: {FREQUENCY_FACTORS} must be {config.head_dim // 2} positive numbers, it is of shape "
            f"{factors.shape}"
        )
    if config.rope_scaling is not None:
        raise UserError(f"{where} has both {FREQUENCY_FACTORS} and a rope scaling; only one of them is supported")
    return dataclasses.replace(config, rope_scaling=FrequencyFactors(tuple(factors.tolist())))
