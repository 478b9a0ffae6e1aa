"""Gemma 2 and Gemma 3 (text) in the Hugging Face layout: config.json to `GemmaConfig` and back."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import (
    DECODER_IGNORED,
    DECODER_TENSORS,
    export_decoder,
    norm,
    parse_activation,
    parse_nullable,
    parse_shape,
    require_whole_rotation,
)
from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.checkpoint.rope import parse_rope, parse_rope_fields, rope_kind
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.gemma import Gemma, GemmaConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def parse_gemma2(config: Fields, dtype: str, max_model_len: int | None = None) -> GemmaConfig:
    """Gemma 2: every second layer is global; scores and logits are bounded unless their caps are null."""
    require_whole_rotation(config)
    theta, scaling = parse_rope(config, max_model_len)
    return GemmaConfig(
        **_parse_shared(config, dtype, pattern=2),
        rope_theta=theta,
        rope_scaling=scaling,
        attn_logit_softcapping=parse_nullable(config, "attn_logit_softcapping", config.number, 50.0),
        final_logit_softcapping=parse_nullable(config, "final_logit_softcapping", config.number, 30.0),
    )


def parse_gemma3(config: Fields, dtype: str, max_model_len: int | None = None) -> GemmaConfig:
    """Gemma 3: every sixth layer is global, or as the file says; a cap on scores is what transformers ignores."""
    config.require("attn_logit_softcapping", None, None)
    rope = config.object("rope_parameters")
    if rope.values:  # one object for each kind of layer
        whole, local = rope.object(GLOBAL), rope.object(LOCAL)
        local_theta = local.number("rope_theta", _LOCAL_THETA)
    else:
        whole, local = config.object("rope_scaling"), Fields({}, config.where)
        local_theta = config.number("rope_local_base_freq", _LOCAL_THETA)
    for fields in (config, whole, local):
        fields.require("partial_rotary_factor", 1.0, 1.0)
    if rope_kind(local) != "default":
        raise UserError(f"{config.where} scales the rotations of local layers, which is not supported")
    theta, scaling = parse_rope_fields(whole, config, max_model_len, _GLOBAL_THETA)
    pattern = config.integer("sliding_window_pattern", None) or config.integer("_sliding_window_pattern", 6)
    return GemmaConfig(
        **_parse_shared(config, dtype, pattern=pattern),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_base_freq=local_theta,
        has_head_norms=True,
        final_logit_softcapping=config.number("final_logit_softcapping", None),
    )


def _parse_shared(config: Fields, dtype: str, *, pattern: int) -> dict[str, Any]:
    """Args: pattern: Every so many layers one is global, where `layer_types` does not say which."""
    config.require("use_bidirectional_attention", False, False)
    config.integer("num_key_value_heads")  # for these two the format has defaults that fit one size of the family
    config.integer("head_dim")
    shape = parse_shape(config, dtype, is_tied=True)
    return shape | {
        "hidden_act": parse_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "local_layers": _parse_local_layers(config, shape["num_hidden_layers"], pattern),
        "sliding_window": config.integer("sliding_window"),
        "query_pre_attn_scalar": config.number("query_pre_attn_scalar", 256.0),
        "attention_bias": config.boolean("attention_bias", False),
    }


def _parse_local_layers(config: Fields, num_layers: int, pattern: int) -> tuple[bool, ...]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple((i + 1) % pattern != 0 for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in (LOCAL, GLOBAL) for kind in kinds):
        raise UserError(
            f"{config.where} must give layer_types as a list of {LOCAL!r} or {GLOBAL!r} for each of {num_layers} "
            f"layers, got {kinds!r}"
        )
    return tuple(kind == LOCAL for kind in kinds)


def export_gemma(config: GemmaConfig) -> dict[str, Any]:
    """config.json's entries; norms of queries and keys make it a Gemma 3.

    Raises:
      UserError: Neither family has this combination of norms, caps and rotations.
    """
    is_gemma3 = config.has_head_norms
    if is_gemma3 != (config.rope_local_base_freq is not None) or is_gemma3 and config.attn_logit_softcapping:
        raise UserError(
            f"neither Gemma 2 nor Gemma 3 has this combination: has_head_norms={is_gemma3}, rope_local_base_freq="
            f"{config.rope_local_base_freq}, attn_logit_softcapping={config.attn_logit_softcapping}"
        )
    names = ("Gemma3ForCausalLM", "gemma3_text") if is_gemma3 else ("Gemma2ForCausalLM", "gemma2")
    entries = export_decoder(config, *names) | {
        "hidden_activation": config.hidden_act,
        "layer_types": [LOCAL if is_local else GLOBAL for is_local in config.local_layers],
        "sliding_window": config.sliding_window,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attention_bias": config.attention_bias,
    }
    return entries | ({"rope_local_base_freq": config.rope_local_base_freq} if is_gemma3 else {})


_TENSORS = {
    **DECODER_TENSORS,
    **norm("layers.{}.attention_post_norm", "model.layers.{}.post_attention_layernorm"),
    **norm("layers.{}.mlp_norm", "model.layers.{}.pre_feedforward_layernorm"),
    **norm("layers.{}.mlp_post_norm", "model.layers.{}.post_feedforward_layernorm"),
}

GEMMA2 = Family(
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    config_class=GemmaConfig,
    module=Gemma,
    parse_config=parse_gemma2,
    export_config=export_gemma,
    tensors=_TENSORS,
    ignored=DECODER_IGNORED,
)
GEMMA3 = Family(
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    config_class=GemmaConfig,
    module=Gemma,
    parse_config=parse_gemma3,
    export_config=export_gemma,
    tensors=_TENSORS,
    ignored=DECODER_IGNORED,
)
