"""Llama and Qwen2 in the Hugging Face layout: config.json to `LlamaConfig` and back."""

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
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.llama import Llama, LlamaConfig


def parse_llama(config: Fields, dtype: str, max_model_len: int | None = None) -> LlamaConfig:
    """Llama: `attention_bias` is one switch for all four projections."""
    bias = config.boolean("attention_bias", False)
    shape = parse_decoder(config, dtype, max_model_len)
    mlp_bias = config.boolean("mlp_bias", False)
    return LlamaConfig(**shape, attention_bias=bias, attention_output_bias=bias, mlp_bias=mlp_bias)


def parse_qwen2(config: Fields, dtype: str, max_model_len: int | None = None) -> LlamaConfig:
    """Qwen2: biases on queries, keys and values, always; sliding windows are a switch that must be off."""
    require_full_attention(config)
    return LlamaConfig(**parse_decoder(config, dtype, max_model_len), attention_bias=True)


def export_llama(config: LlamaConfig) -> dict[str, Any]:
    """config.json's entries; a bias on queries, keys and values alone makes it a Qwen2.

    Raises:
      UserError: Neither family has this combination of biases.
    """
    is_qwen2 = config.attention_bias and not config.attention_output_bias
    if is_qwen2 and config.mlp_bias or config.attention_output_bias and not config.attention_bias:
        raise UserError(
            "neither Llama nor Qwen2 has this combination: "
            f"attention_bias={config.attention_bias}, attention_output_bias={config.attention_output_bias}, "
            f"mlp_bias={config.mlp_bias}"
        )
    if is_qwen2:
        return export_decoder(config, "Qwen2ForCausalLM", "qwen2") | {"use_sliding_window": False}
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return export_decoder(config, "LlamaForCausalLM", "llama") | biases


LLAMA = Family(
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    config_class=LlamaConfig,
    module=Llama,
    parse_config=parse_llama,
    export_config=export_llama,
    tensors=DECODER_TENSORS,
    ignored=DECODER_IGNORED,
)
QWEN2 = Family(
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config_class=LlamaConfig,
    module=Llama,
    parse_config=parse_qwen2,
    export_config=export_llama,
    tensors=DECODER_TENSORS,
    ignored=DECODER_IGNORED,
)
