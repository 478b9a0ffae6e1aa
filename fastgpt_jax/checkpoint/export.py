"""Writes a model into a folder in the Hugging Face layout: config.json, generation_config.json, model.safetensors.

Knows no training. The one idea: the table that reads a family also writes it, so that `load_model` gives back what was
written. The tokenizer's files are the caller's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgpt_jax.checkpoint.huggingface import DTYPES
from fastgpt_jax.checkpoint.parameters import named_leaves, parts_of_tensors
from fastgpt_jax.checkpoint.registry import family_of
from fastgpt_jax.checkpoint.safetensors_io import write_safetensors
from fastgpt_jax.checkpoint.tensors import SINGLE_FILE
from fastgpt_jax.errors import UserError


def export_model(
    model: nnx.Module,
    config: Any,
    folder: str | Path,
    *,
    dtype: str = "float32",
    eos_token_ids: tuple[int, ...] = (),
    bos_token_id: int | None = None,
) -> None:
    """Writes the model's parameters and configuration; files of the same names are overwritten.

    Args:
      model: A module of one of the families.
      config: Its configuration.
      dtype: The dtype of the tensors written, which loading takes over; `float32`, `bfloat16` or `float16`.
      eos_token_ids: Tokens that end a text.

    Raises:
      UserError: No Hugging Face layout is known for this configuration, or the dtype is none of the three.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    family = family_of(config)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokens: dict[str, Any] = {}
    if bos_token_id is not None:
        tokens["bos_token_id"] = bos_token_id
    if eos_token_ids:
        tokens["eos_token_id"] = eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids)
    _write_json(path / "config.json", family.export_config(config) | tokens | {"torch_dtype": dtype})
    _write_json(path / "generation_config.json", tokens)
    flat_state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    parameters = [(tensor, variable) for _, tensor, variable in named_leaves(family.tensors, flat_state)]
    is_transposed = {tensor.name: tensor.is_transposed for tensor, _ in parameters}
    tensors = {}
    for name, parts in parts_of_tensors(parameters).items():
        values = np.concatenate([np.asarray(variable.get_value()) for variable in parts], axis=-1)
        values = values.T if is_transposed[name] else values
        tensors[name] = np.ascontiguousarray(values).astype(jnp.dtype(dtype))
    write_safetensors(path / SINGLE_FILE, tensors)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
