"""Ordinary training forwards in Flax NNX: tokens [B, T] in, logits [B, T, V] out; serving is derived from them."""

from fastgpt_jax.models.gpt2 import GPT2, GPT2Config
from fastgpt_jax.models.llama import Llama, LlamaConfig

__all__ = ["GPT2", "GPT2Config", "Llama", "LlamaConfig"]
