"""Bloom in the Hugging Face layout: config.json to `BloomConfig` and back, and the names of the tensors."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import EMBED, HEADS, MLP, VOCAB, linear, norm
from fastgpt_jax.checkpoint.family import Family, Tensor
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.bloom import Bloom, BloomConfig


def parse_bloom(config: Fields, dtype: str, max_model_len: int | None = None) -> BloomConfig:
    """Reads Bloom's own names, of which several files have others; residuals must be taken before the norms."""
    config.require("apply_residual_connection_post_layernorm", False, False)

    def either(name: str, other: str) -> int:
        return config.integer(other) if other in config else config.integer(name)

    return BloomConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=either("hidden_size", "n_embed"),
        num_hidden_layers=either("n_layer", "num_hidden_layers"),
        num_attention_heads=either("n_head", "num_attention_heads"),
        max_position_embeddings=config.integer("seq_length", 2048),
        layer_norm_eps=config.number("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        dtype=dtype,
    )


def export_bloom(config: BloomConfig) -> dict[str, Any]:
    """config.json's entries."""
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
    }


BLOOM = Family(
    model_types=("bloom",),
    architectures=("BloomForCausalLM",),
    config_class=BloomConfig,
    module=Bloom,
    parse_config=parse_bloom,
    export_config=export_bloom,
    tensors={
        "embed.embedding": Tensor("transformer.word_embeddings.weight", (VOCAB, EMBED)),
        **norm("embed_norm", "transformer.word_embeddings_layernorm"),
        **norm("norm", "transformer.ln_f"),
        **linear("head", "lm_head", EMBED, VOCAB),
        **norm("layers.{}.attention_norm", "transformer.h.{}.input_layernorm"),
        **linear("layers.{}.attention.qkv", "transformer.h.{}.self_attention.query_key_value", EMBED, HEADS),
        **linear("layers.{}.attention.output", "transformer.h.{}.self_attention.dense", HEADS, EMBED),
        **norm("layers.{}.mlp_norm", "transformer.h.{}.post_attention_layernorm"),
        **linear("layers.{}.mlp.up", "transformer.h.{}.mlp.dense_h_to_4h", EMBED, MLP),
        **linear("layers.{}.mlp.down", "transformer.h.{}.mlp.dense_4h_to_h", MLP, EMBED),
    },
    ignored=(r"lm_head\.weight",),  # a tied model's head, a second time
    prefix="transformer.",  # The published files name tensors without it.
)
