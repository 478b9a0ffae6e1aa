"""Qwen3 in the Hugging Face layout: config.json to `Qwen3Config` and back."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import (
    DECODER_IGNORED,
    DECODER_TENSORS,
    export_decoder,
    parse_decoder,
    require_full_attention,
)
from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.qwen3 import Qwen3, Qwen3Config


def parse_qwen3(config: Fields, dtype: str, max_model_len: int | None = None) -> Qwen3Config:
    """`attention_bias` is one switch for all four projections; sliding windows must be off."""
    require_full_attention(config)
    config.integer("num_key_value_heads")  # for these two the format has defaults that fit one size of the family
    config.integer("head_dim")
    bias = config.boolean("attention_bias", False)
    return Qwen3Config(**parse_decoder(config, dtype, max_model_len), attention_bias=bias)


def export_qwen3(config: Qwen3Config) -> dict[str, Any]:
    """config.json's entries."""
    shape = export_decoder(config, "Qwen3ForCausalLM", "qwen3")
    return shape | {"attention_bias": config.attention_bias, "use_sliding_window": False}


QWEN3 = Family(
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config_class=Qwen3Config,
    module=Qwen3,
    parse_config=parse_qwen3,
    export_config=export_qwen3,
    tensors=DECODER_TENSORS,
    ignored=DECODER_IGNORED,
)
