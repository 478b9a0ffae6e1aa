"""GGUF, llama.cpp's file of a whole model: metadata, tokenizer and (quantized) tensors, read into our families."""

from fastgpt_jax.checkpoint.gguf.reader import GGUFFile

__all__ = ["GGUFFile"]
