"""A folder in the Hugging Face layout becomes a model with its parameters, tokenizer and defaults.

Knows the layout, no family and no serving. The one idea: everything that can be wrong with the folder is one clear
`UserError`, found before the weights are read wherever the small files can show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx

from fastgpt_jax.checkpoint.parameters import load_module
from fastgpt_jax.checkpoint.registry import find_family
from fastgpt_jax.checkpoint.rope import rope_notes
from fastgpt_jax.checkpoint.tensors import TensorFolder, open_tensor_folder
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.json_fields import Fields, read_json_object, read_optional_json_object
from fastgpt_jax.tokenizer import Tokenizer, load_tokenizer
from fastgpt_jax.tokenizer.chat_template import load_chat_template

DTYPES = ("float32", "bfloat16", "float16")
_DTYPE_OF_TENSORS = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be called, trained or compiled.

    `tokenizer` is None where the folder has none: such a model is served on token ids. `chat_template` is the source of
    a Jinja template. `name` is the folder's. `notes` say what was decided on loading and cannot be changed later, such
    as `rope_scaling`: which factors of `longrope` the model was given.
    """

    model: nnx.Module
    config: Any
    name: str
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    chat_template: str | None
    vocab_size: int
    notes: Mapping[str, str] = field(default_factory=dict)


def load_folder(path: Path, *, dtype: str | None = None, max_model_len: int | None = None) -> LoadedModel:
    """Loads config.json, safetensors, tokenizer, generation_config.json and chat template; see `load_model`."""
    if not path.exists():
        raise UserError(f"no such folder: {path}")
    if not path.is_dir():
        raise UserError(
            f"{path} must be a folder in the Hugging Face layout or a .gguf file, but it is a file of another kind"
        )
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json, so it is not a model folder in the Hugging Face layout")
    raw = read_json_object(path / "config.json")
    family = find_family(raw)
    if "quantization_config" in raw:
        method = raw.object("quantization_config").string("quant_method", "unnamed")
        raise UserError(f"{raw.where} says the weights are quantized ({method}); only float checkpoints can be loaded")
    tensors = open_tensor_folder(path)
    config = family.parse_config(raw, _choose_dtype(dtype, raw, tensors), max_model_len)
    tokenizer = load_tokenizer(path)
    own_limit = config.max_position_embeddings
    generation = _parse_generation(path, raw, min(own_limit, max_model_len or own_limit), tokenizer)
    return LoadedModel(
        model=load_module(family, config, tensors, str(path)),
        config=config,
        name=path.resolve().name,
        tokenizer=tokenizer,
        generation=generation,
        chat_template=load_chat_template(path),
        vocab_size=config.vocab_size,
        notes=rope_notes(getattr(config, "rope_scaling", None)),
    )


def _choose_dtype(asked: str | None, raw: Fields, tensors: TensorFolder) -> str:
    # Newer files write `dtype`, older ones `torch_dtype`.
    named = asked or raw.string("dtype", None) or raw.string("torch_dtype", None)
    if named is None:
        found = {_DTYPE_OF_TENSORS.get(tensors.dtype_name(name)) for name in tensors.names} - {None}
        return next((dtype for dtype in DTYPES if dtype in found), "float32")
    if named not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {named!r}")
    return named


def _parse_generation(
    folder: Path, config: Fields, max_model_len: int, tokenizer: Tokenizer | None
) -> GenerationDefaults:
    """generation_config.json before config.json before the tokenizer."""
    generation = read_optional_json_object(folder / "generation_config.json")

    def first_id(name: str) -> int | None:
        ids = generation.token_ids(name) or config.token_ids(name)
        return ids[0] if ids else None

    eos_token_ids = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    bos_token_id = first_id("bos_token_id")
    if tokenizer is not None:
        eos_token_ids = eos_token_ids or tokenizer.eos_token_ids
        bos_token_id = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
    return GenerationDefaults(max_model_len, eos_token_ids, bos_token_id, first_id("pad_token_id"))
