"""Phi-3 in the Hugging Face layout: config.json to `Phi3Config` and back, and the parts of its fused tensors."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import (
    DECODER_IGNORED,
    DECODER_TENSORS,
    EMBED,
    HEADS,
    KV_HEADS,
    MLP,
    export_decoder,
    linear,
    parse_activation,
    parse_shape,
)
from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.checkpoint.rope import parse_partial_rotary_factor, parse_rope
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.rope import LongRopeScaling
from fastgpt_jax.models.phi3 import Phi3, Phi3Config


def parse_phi3(config: Fields, dtype: str, max_model_len: int | None = None) -> Phi3Config:
    """`longrope` is the one scaling the family has; `max_model_len` decides between its two sets of factors."""
    theta, scaling = parse_rope(config, max_model_len)
    if not isinstance(scaling, LongRopeScaling | None):
        raise UserError(f"{config.where} asks for a rope scaling that Phi-3 does not have; it has 'longrope'")
    return Phi3Config(
        **parse_shape(config, dtype, rms_norm_eps=1e-5),
        hidden_act=parse_activation(config, "hidden_act", "silu"),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=config.integer("sliding_window", None),
        partial_rotary_factor=parse_partial_rotary_factor(config),
    )


def export_phi3(config: Phi3Config) -> dict[str, Any]:
    """config.json's entries."""
    switches: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    if isinstance(config.rope_scaling, LongRopeScaling):
        switches["original_max_position_embeddings"] = config.rope_scaling.original_max_position_embeddings
    return export_decoder(config, "Phi3ForCausalLM", "phi3") | switches


PHI3 = Family(
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    config_class=Phi3Config,
    module=Phi3,
    parse_config=parse_phi3,
    export_config=export_phi3,
    tensors={
        **DECODER_TENSORS,
        **linear("layers.{}.attention.query", "model.layers.{}.self_attn.qkv_proj", EMBED, HEADS),
        **linear("layers.{}.attention.key", "model.layers.{}.self_attn.qkv_proj", EMBED, KV_HEADS, part=1),
        **linear("layers.{}.attention.value", "model.layers.{}.self_attn.qkv_proj", EMBED, KV_HEADS, part=2),
        **linear("layers.{}.mlp.gate", "model.layers.{}.mlp.gate_up_proj", EMBED, MLP),
        **linear("layers.{}.mlp.up", "model.layers.{}.mlp.gate_up_proj", EMBED, MLP, part=1),
    },
    ignored=DECODER_IGNORED,
)
