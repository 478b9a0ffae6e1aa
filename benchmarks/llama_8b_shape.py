"""A Llama of 8B parameters by shape, for `fastgpt explain`: no weight is made.

fastgpt explain benchmarks/llama_8b_shape.py:make_model --max_model_len 8192
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from fastgpt_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    dtype="bfloat16",
)


def make_model() -> tuple[Any, Any]:
    """Returns the forward and its parameters, layers written out in a Python loop."""
    graphdef, state = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)))
    return (lambda params, tokens: nnx.merge(graphdef, params)(tokens)), nnx.to_pure_dict(state)
