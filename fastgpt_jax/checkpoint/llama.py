"""Llama and Qwen2 in the Hugging Face layout: config.json to `LlamaConfig` and back, and the names of the tensors."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.family import Family, Tensor
from fastgpt_jax.checkpoint.rope import export_rope, parse_rope
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.mlp import ACTIVATIONS
from fastgpt_jax.models.llama import Llama, LlamaConfig
from sharding.axes import LogicalAxis

EMBED, HEADS, KV_HEADS = LogicalAxis.EMBED, LogicalAxis.HEADS, LogicalAxis.KV_HEADS
MLP, VOCAB = LogicalAxis.MLP, LogicalAxis.VOCAB


def parse_llama(config: Fields, dtype: str) -> LlamaConfig:
    """Llama: `attention_bias` is one switch for all four projections."""
    bias = config.boolean("attention_bias", False)
    return _parse(config, dtype, attention_bias=bias, attention_output_bias=bias)


def parse_qwen2(config: Fields, dtype: str) -> LlamaConfig:
    """Qwen2: biases on queries, keys and values, always; sliding windows are a switch that must be off."""
    config.require("use_sliding_window", False, False)
    return _parse(config, dtype, attention_bias=True, attention_output_bias=False)


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
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": export_rope(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
        "torch_dtype": config.dtype,
    }
    if is_qwen2:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False} | shared
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shared | biases


def _parse(config: Fields, dtype: str, *, attention_bias: bool, attention_output_bias: bool) -> LlamaConfig:
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    if "head_dim" not in config and hidden_size % num_heads:
        raise UserError(
            f"{config.where} gives no head_dim, so hidden_size must be a multiple of num_attention_heads, "
            f"got {hidden_size} and {num_heads}"
        )
    activation = config.string("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{config.where} has hidden_act={activation!r}; supported are {', '.join(ACTIVATIONS)}")
    theta, scaling = parse_rope(config)
    return LlamaConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=config.boolean("mlp_bias", False),
        hidden_act=activation,
        dtype=dtype,
    )


def _linear(module: str, name: str, fan_in: LogicalAxis, fan_out: LogicalAxis) -> dict[str, Tensor]:
    return {
        f"{module}.kernel": Tensor(f"{name}.weight", (fan_in, fan_out), is_transposed=True),
        f"{module}.bias": Tensor(f"{name}.bias", (fan_out,)),
    }


_TENSORS = {
    "embed.embedding": Tensor("model.embed_tokens.weight", (VOCAB, EMBED)),
    "norm.weight": Tensor("model.norm.weight", (EMBED,)),
    **_linear("head", "lm_head", EMBED, VOCAB),
    "layers.{}.attention_norm.weight": Tensor("model.layers.{}.input_layernorm.weight", (EMBED,)),
    **_linear("layers.{}.attention.query", "model.layers.{}.self_attn.q_proj", EMBED, HEADS),
    **_linear("layers.{}.attention.key", "model.layers.{}.self_attn.k_proj", EMBED, KV_HEADS),
    **_linear("layers.{}.attention.value", "model.layers.{}.self_attn.v_proj", EMBED, KV_HEADS),
    **_linear("layers.{}.attention.output", "model.layers.{}.self_attn.o_proj", HEADS, EMBED),
    "layers.{}.mlp_norm.weight": Tensor("model.layers.{}.post_attention_layernorm.weight", (EMBED,)),
    **_linear("layers.{}.mlp.gate", "model.layers.{}.mlp.gate_proj", EMBED, MLP),
    **_linear("layers.{}.mlp.up", "model.layers.{}.mlp.up_proj", EMBED, MLP),
    **_linear("layers.{}.mlp.down", "model.layers.{}.mlp.down_proj", MLP, EMBED),
}
# A tied model's file may hold its head a second time.
_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")

LLAMA = Family(
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    config_class=LlamaConfig,
    module=Llama,
    parse_config=parse_llama,
    export_config=export_llama,
    tensors=_TENSORS,
    ignored=_IGNORED,
)
QWEN2 = Family(
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config_class=LlamaConfig,
    module=Llama,
    parse_config=parse_qwen2,
    export_config=export_llama,
    tensors=_TENSORS,
    ignored=_IGNORED,
)
