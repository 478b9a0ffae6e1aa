"""Finds the tokenizer in a folder of the Hugging Face layout.

Knows file names; encodes nothing. The one idea: tokenizer.json says how to encode, tokenizer_config.json which tokens
begin and end a text.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields, read_optional_json_object
from fastgpt_jax.tokenizer.byte_level import MERGES_FILE, VOCAB_FILE, make_byte_level_tokenizer
from fastgpt_jax.tokenizer.byte_level_kinds import KINDS, ByteLevelKind
from fastgpt_jax.tokenizer.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Loads tokenizer.json, or vocab.json and merges.txt; None where the folder has neither.

    Raises:
      UserError: A file is there and cannot be read.
    """
    path = Path(folder)
    config = read_optional_json_object(path / "tokenizer_config.json")
    if (path / TOKENIZER_FILE).exists():
        backend = read_tokenizer_json(path / TOKENIZER_FILE)
    elif (path / VOCAB_FILE).exists() and (path / MERGES_FILE).exists():
        backend = make_byte_level_tokenizer(path, _find_kind(path, config), config)
    else:
        return None
    special = read_optional_json_object(path / "special_tokens_map.json")
    bos_token_id = _special_id("bos_token", backend, config, special)
    eos_token_id = _special_id("eos_token", backend, config, special)
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id,
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
        add_bos=config.boolean("add_bos_token", False),
    )


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Reads the library's file; raises UserError where it cannot be."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"cannot read {path} as a tokenizer: {error}") from error


def _find_kind(folder: Path, config: Fields) -> ByteLevelKind:
    """GPT-2's way of cutting words, unless the folder says it is a Qwen2."""
    model_type = read_optional_json_object(folder / "config.json").string("model_type", "")
    is_qwen2 = config.string("tokenizer_class", "").startswith("Qwen2") or model_type == "qwen2"
    return KINDS["qwen2" if is_qwen2 else "gpt-2"]


def _special_id(name: str, backend: tokenizers.Tokenizer, *sources: Fields) -> int | None:
    """The id of a special token, written as its text or as an object that holds it; None where it is not given."""
    for source in sources:
        value = source.values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            return backend.token_to_id(text)
    return None
