"""GPT-2 in the Hugging Face layout: config.json to `GPT2Config` and back, and the names of the tensors."""

from __future__ import annotations

from typing import Any

from fastgpt_jax.checkpoint.decoder import EMBED, HEADS, KV_HEADS, MLP, VOCAB, norm, parse_activation
from fastgpt_jax.checkpoint.family import Family, Tensor
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.gpt2 import GPT2, GPT2Config
from sharding.axes import LogicalAxis


def parse_gpt2(config: Fields, dtype: str, max_model_len: int | None = None) -> GPT2Config:
    """Reads GPT-2's own names; switches that change the forward must stand at their defaults."""
    config.require("scale_attn_weights", True, True)
    config.require("scale_attn_by_inverse_layer_idx", False, False)
    config.require("add_cross_attention", False, False)
    width = config.integer("n_embd")
    return GPT2Config(
        vocab_size=config.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=config.integer("n_inner", 4 * width),
        num_hidden_layers=config.integer("n_layer"),
        num_attention_heads=config.integer("n_head"),
        max_position_embeddings=config.integer("n_positions"),
        layer_norm_eps=config.number("layer_norm_epsilon", 1e-5),
        hidden_act=parse_activation(config, "activation_function", "gelu_new"),
        tie_word_embeddings=config.boolean("tie_word_embeddings", True),
        dtype=dtype,
    )


def export_gpt2(config: GPT2Config) -> dict[str, Any]:
    """config.json's entries."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "activation_function": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
    }


def _conv1d(module: str, name: str, fan_in: LogicalAxis, fan_out: LogicalAxis, part: int = 0) -> dict[str, Tensor]:
    """Hugging Face's `Conv1D` stores [in, out], as ours does."""
    return {
        f"{module}.kernel": Tensor(f"{name}.weight", (fan_in, fan_out), part=part),
        f"{module}.bias": Tensor(f"{name}.bias", (fan_out,), part=part),
    }


GPT2_FAMILY = Family(
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    config_class=GPT2Config,
    module=GPT2,
    parse_config=parse_gpt2,
    export_config=export_gpt2,
    tensors={
        "embed.embedding": Tensor("transformer.wte.weight", (VOCAB, EMBED)),
        "positions.embedding": Tensor("transformer.wpe.weight", (None, EMBED)),
        "head.kernel": Tensor("lm_head.weight", (EMBED, VOCAB), is_transposed=True),
        **norm("norm", "transformer.ln_f"),
        **norm("layers.{}.attention_norm", "transformer.h.{}.ln_1"),
        **_conv1d("layers.{}.attention.query", "transformer.h.{}.attn.c_attn", EMBED, HEADS),
        **_conv1d("layers.{}.attention.key", "transformer.h.{}.attn.c_attn", EMBED, KV_HEADS, part=1),
        **_conv1d("layers.{}.attention.value", "transformer.h.{}.attn.c_attn", EMBED, KV_HEADS, part=2),
        **_conv1d("layers.{}.attention.output", "transformer.h.{}.attn.c_proj", HEADS, EMBED),
        **norm("layers.{}.mlp_norm", "transformer.h.{}.ln_2"),
        **_conv1d("layers.{}.mlp.up", "transformer.h.{}.mlp.c_fc", EMBED, MLP),
        **_conv1d("layers.{}.mlp.down", "transformer.h.{}.mlp.c_proj", MLP, EMBED),
    },
    # Causal masks stored as buffers; the head a second time.
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    prefix="transformer.",  # OpenAI's original upload names tensors without it.
)
