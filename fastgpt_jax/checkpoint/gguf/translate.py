"""GGUF's names and settings in Hugging Face's spelling, so that a family's own table reads both layouts.

Knows llama.cpp's conventions for the architectures `llama` and `qwen2`, no bytes. The one idea: nothing about a family
is said twice; metadata become a config.json, names become names, and what differs in the numbers is undone on reading:
for `llama`, the rows of queries and keys, which llama.cpp orders for rotations of neighbouring pairs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.rope import RopeScaling

ARCHITECTURES = ("llama", "qwen2")
FREQUENCY_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_SHARED: Mapping[str, str] = MappingProxyType(
    {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
)
_OF_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


@dataclass(frozen=True)
class FrequencyFactors(RopeScaling):
    """Every frequency divided by a factor of its own, as the file lists them: Llama 3.1's scaling, worked out."""

    factors: tuple[float, ...]

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / np.asarray(self.factors)


def translate_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that is not known stays as it is."""
    if name in _SHARED:
        return _SHARED[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _OF_LAYER:
        return f"model.layers.{parts[1]}.{_OF_LAYER[parts[2]]}.{parts[3]}"
    return name


def num_interleaved_heads(name: str, config: Fields) -> int | None:
    """How many heads the rows of this tensor are, where llama.cpp has reordered them; None for all other tensors."""
    if config.values["model_type"] != "llama":
        return None
    match name.split("."):
        case ["blk", _, "attn_q", _]:
            return config.integer("num_attention_heads")
        case ["blk", _, "attn_k", _]:
            return config.integer("num_key_value_heads")
    return None


def undo_interleaving(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Moves row `2 i + j` of every head of H rows to row `j H / 2 + i`."""
    if len(values) % (2 * num_heads):
        return values  # of a wrong shape, which whoever asked for it will tell
    rows = values.reshape(num_heads, len(values) // num_heads // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def translate_config(metadata: Fields, vocab_size: int, names: Collection[str]) -> Fields:
    """The config.json that the metadata amount to.

    Args:
      vocab_size: Rows of the token embedding.
      names: The file's own tensor names, which say what the metadata do not: biases, and whether there is a head.

    Raises:
      UserError: Another architecture, or a setting that its forward here does not have, or a field is missing.
    """
    architecture = metadata.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{metadata.where} holds a model of the architecture {architecture!r}, which is not read from GGUF; those "
            f"that are: {', '.join(ARCHITECTURES)}; take the model as a Hugging Face folder instead"
        )
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.values.items() if name.startswith(prefix)}
    fields = Fields(own, f"{metadata.where} ({architecture}.*)")
    fields.require("expert_count", 0, 0)
    width, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", width // num_heads)
    fields.require("attention.value_length", head_dim, head_dim)
    fields.require("rope.dimension_count", head_dim, head_dim)
    values = {
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields),
        "tie_word_embeddings": HEAD not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
    }
    return Fields(values, metadata.where)


def _rope_scaling(fields: Fields) -> dict[str, Any] | None:
    kind = fields.string("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    original = fields.integer("rope.scaling.original_context_length", None)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    # llama.cpp multiplies YaRN's own amplitude by its setting, Hugging Face's setting replaces it.
    amplitude = fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn" and amplitude != 1.0:
        scaling["attention_factor"] = amplitude * (0.1 * math.log(scaling["factor"]) + 1.0)
    for theirs, ours in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
        value = fields.number(f"rope.scaling.{theirs}", None)
        if value is not None:
            scaling[ours] = value
    return scaling
