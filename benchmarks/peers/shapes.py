"""The shapes of the models that engines are compared on, as their `config.json`; weights are random.

Knows no engine and imports nothing: every environment reads it. The one idea: a shape is public (TinyLlama-1.1B,
Qwen2-0.5B), so that anybody's figures for the real model can be held against ours, and nothing has to be fetched.
"""

from __future__ import annotations

import dataclasses
from typing import Any

BOS, EOS, FIRST_ID = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, or of a Qwen2 where `is_qwen2` (biases on queries, keys and values; heads tied)."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    rms_norm_eps: float
    is_qwen2: bool
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in one layer, and as many of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """`[rows, columns]` of a layer's matrices, as Hugging Face names and lays them out."""
        d, f = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (self.kv_width, d),
            "self_attn.v_proj": (self.kv_width, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    @property
    def num_read(self) -> int:
        """Weights that a decode step must read: all matrices and the head, of the embedding a row a token."""
        layer = sum(rows * columns for rows, columns in self.matrix_shapes.values())
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def prefill_operations(self) -> int:
        """Of a prompt's token in all matrices, attention left out; the head is for the last token alone."""
        return 2 * (self.num_read - self.vocab_size * self.hidden_size)

    def kv_bytes_a_token(self, num_bytes: int) -> int:
        """Bytes of a token's keys and values, all layers, at so many bytes a number."""
        return 2 * self.num_layers * self.kv_width * num_bytes

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        config = {
            "architectures": ["Qwen2ForCausalLM" if self.is_qwen2 else "LlamaForCausalLM"],
            "model_type": "qwen2" if self.is_qwen2 else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.is_qwen2,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "float32",
        }
        if self.is_qwen2:
            return config | {"use_sliding_window": False}
        return config | {"attention_bias": False, "mlp_bias": False, "head_dim": self.head_dim}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 1e4, 1e-5, False, 4096),
        Shape("qwen2-0.5b", 151936, 896, 4864, 24, 14, 2, 1e6, 1e-6, True, 40960),
        Shape("tiny", 512, 128, 384, 2, 4, 2, 1e4, 1e-5, False, 40960),
    )
}
"""`tiny` tries the harness. Contexts are longer than the real models' where a measurement needs it."""
