"""What the rotary decoders have in common in the Hugging Face layout: entries of config.json and names of tensors.

Knows no family. The one idea: a family adds its own switches to the shared fields, and each switch that changes the
forward is honoured or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgpt_jax.checkpoint.family import Tensor
from fastgpt_jax.checkpoint.rope import export_rope, parse_partial_rotary_factor, parse_rope
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.decoder import DecoderConfig
from fastgpt_jax.models.layers.mlp import ACTIVATIONS
from sharding.axes import LogicalAxis

EMBED, HEADS, KV_HEADS = LogicalAxis.EMBED, LogicalAxis.HEADS, LogicalAxis.KV_HEADS
MLP, VOCAB = LogicalAxis.MLP, LogicalAxis.VOCAB


def parse_shape(config: Fields, dtype: str, *, is_tied: bool = False, rms_norm_eps: float = 1e-6) -> dict[str, Any]:
    """The fields of every `DecoderConfig` but its rotations, from Hugging Face's names and defaults.

    Args:
      is_tied: What `tie_word_embeddings` is where the file does not say.
      rms_norm_eps: Likewise.
    """
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    if "head_dim" not in config and hidden_size % num_heads:
        raise UserError(
            f"{config.where} gives no head_dim, so hidden_size must be a multiple of num_attention_heads, "
            f"got {hidden_size} and {num_heads}"
        )
    return {
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size"),
        "num_hidden_layers": config.integer("num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": config.integer("num_key_value_heads", num_heads),
        "head_dim": config.integer("head_dim", hidden_size // num_heads),
        "max_position_embeddings": config.integer("max_position_embeddings"),
        "rms_norm_eps": config.number("rms_norm_eps", rms_norm_eps),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", is_tied),
        "dtype": dtype,
    }


def parse_decoder(config: Fields, dtype: str, max_model_len: int | None, **defaults: Any) -> dict[str, Any]:
    """The fields of every `DecoderConfig`; `defaults` as in `parse_shape`."""
    require_whole_rotation(config)
    theta, scaling = parse_rope(config, max_model_len)
    rope = {"rope_theta": theta, "rope_scaling": scaling}
    return (
        parse_shape(config, dtype, **defaults) | rope | {"hidden_act": parse_activation(config, "hidden_act", "silu")}
    )


def parse_activation(config: Fields, name: str, default: str) -> str:
    """The name of an activation that there is."""
    activation = config.string(name, default)
    if activation not in ACTIVATIONS:
        raise UserError(f"{config.where} has {name}={activation!r}; supported are {', '.join(ACTIVATIONS)}")
    return activation


def parse_nullable(config: Fields, name: str, read: Callable[..., Any], default: Any) -> Any:
    """A field for which null has a meaning of its own, None, and being absent another, `default`."""
    return read(name, None) if name in config.values else default


def require_full_attention(config: Fields) -> None:
    """Refuses layers of which some see a sliding window, for a family served without."""
    config.require("use_sliding_window", False, False)
    layer_types = config.values.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise UserError(f"{config.where} has layer_types other than 'full_attention', which is not supported")


def require_whole_rotation(config: Fields) -> None:
    """Refuses heads of which a part alone is rotated."""
    factor = parse_partial_rotary_factor(config)
    if factor != 1:
        raise UserError(f"{config.where} has partial_rotary_factor={factor}, which is not supported; only 1.0 is")


def export_decoder(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """The entries of config.json that every rotary decoder has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
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


def linear(module: str, name: str, fan_in: LogicalAxis, fan_out: LogicalAxis, part: int = 0) -> dict[str, Tensor]:
    """A projection, stored transposed, with the bias that it may have."""
    return {
        f"{module}.kernel": Tensor(f"{name}.weight", (fan_in, fan_out), is_transposed=True, part=part),
        f"{module}.bias": Tensor(f"{name}.bias", (fan_out,), part=part),
    }


def norm(module: str, name: str) -> dict[str, Tensor]:
    """A norm over the model's width, with the bias that it may have."""
    return {
        f"{module}.weight": Tensor(f"{name}.weight", (EMBED,)),
        f"{module}.bias": Tensor(f"{name}.bias", (EMBED,)),
    }


DECODER_TENSORS = {
    "embed.embedding": Tensor("model.embed_tokens.weight", (VOCAB, EMBED)),
    **norm("norm", "model.norm"),
    **linear("head", "lm_head", EMBED, VOCAB),
    **norm("layers.{}.attention_norm", "model.layers.{}.input_layernorm"),
    **linear("layers.{}.attention.query", "model.layers.{}.self_attn.q_proj", EMBED, HEADS),
    **linear("layers.{}.attention.key", "model.layers.{}.self_attn.k_proj", EMBED, KV_HEADS),
    **linear("layers.{}.attention.value", "model.layers.{}.self_attn.v_proj", EMBED, KV_HEADS),
    **linear("layers.{}.attention.output", "model.layers.{}.self_attn.o_proj", HEADS, EMBED),
    "layers.{}.attention.query_norm.weight": Tensor("model.layers.{}.self_attn.q_norm.weight", (None,)),
    "layers.{}.attention.key_norm.weight": Tensor("model.layers.{}.self_attn.k_norm.weight", (None,)),
    **norm("layers.{}.mlp_norm", "model.layers.{}.post_attention_layernorm"),
    **linear("layers.{}.mlp.gate", "model.layers.{}.mlp.gate_proj", EMBED, MLP),
    **linear("layers.{}.mlp.up", "model.layers.{}.mlp.up_proj", EMBED, MLP),
    **linear("layers.{}.mlp.down", "model.layers.{}.mlp.down_proj", MLP, EMBED),
}
# A tied model's file may hold its head a second time.
DECODER_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
