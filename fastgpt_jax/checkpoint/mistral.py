"""Mistral in the Hugging Face layout: config.json to `MistralConfig` and back."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import (
    DECODER_IGNORED,
    DECODER_TENSORS,
    export_decoder,
    parse_decoder,
    parse_nullable,
)
from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.mistral import Mistral, MistralConfig

_DEFAULT_WINDOW = 4096


def parse_mistral(config: Fields, dtype: str, max_model_len: int | None = None) -> MistralConfig:
    """A `sliding_window` that is null means none, one that is absent the family's first, 4096."""
    config.require("layer_types", None, None)
    config.integer("num_key_value_heads")  # the format's default is neither the number of heads nor any use
    window = parse_nullable(config, "sliding_window", config.integer, _DEFAULT_WINDOW)
    return MistralConfig(**parse_decoder(config, dtype, max_model_len), sliding_window=window)


def export_mistral(config: MistralConfig) -> dict[str, Any]:
    """config.json's entries."""
    shape = export_decoder(config, "MistralForCausalLM", "mistral")
    return shape | {"sliding_window": config.sliding_window}


MISTRAL = Family(
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config_class=MistralConfig,
    module=Mistral,
    parse_config=parse_mistral,
    export_config=export_mistral,
    tensors=DECODER_TENSORS,
    ignored=DECODER_IGNORED,
)
