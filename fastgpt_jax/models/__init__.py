"""Ordinary training forwards in Flax NNX: tokens [B, T] in, logits [B, T, V] out; serving is derived from them."""

from fastgpt_jax.models.bloom import Bloom, BloomConfig
from fastgpt_jax.models.gemma import Gemma, GemmaConfig
from fastgpt_jax.models.gpt2 import GPT2, GPT2Config
from fastgpt_jax.models.llama import Llama, LlamaConfig
from fastgpt_jax.models.mistral import Mistral, MistralConfig
from fastgpt_jax.models.phi3 import Phi3, Phi3Config
from fastgpt_jax.models.qwen3 import Qwen3, Qwen3Config

__all__ = [
    "GPT2",
    "Bloom",
    "BloomConfig",
    "GPT2Config",
    "Gemma",
    "GemmaConfig",
    "Llama",
    "LlamaConfig",
    "Mistral",
    "MistralConfig",
    "Phi3",
    "Phi3Config",
    "Qwen3",
    "Qwen3Config",
]
