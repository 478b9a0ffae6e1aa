"""Text to token ids and back, over the `tokenizers` library; chat templates. Imports no model and no jax."""

from fastgpt_jax.tokenizer.detokenizer import Detokenizer
from fastgpt_jax.tokenizer.loading import load_tokenizer
from fastgpt_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]
