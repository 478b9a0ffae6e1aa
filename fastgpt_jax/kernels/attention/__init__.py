"""Attention: what it means (`spec`), its implementations, and how one is chosen."""

from fastgpt_jax.kernels.attention.dispatch import IMPLEMENTATIONS, attention, attention_per_head
from fastgpt_jax.kernels.attention.flash import flash_attn_func
from fastgpt_jax.kernels.attention.spec import AttentionSpec

__all__ = ["IMPLEMENTATIONS", "AttentionSpec", "attention", "attention_per_head", "flash_attn_func"]
