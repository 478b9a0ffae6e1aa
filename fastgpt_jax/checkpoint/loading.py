"""From a path on disk to a model, whichever of the layouts it has.

The one idea: a GGUF file, or a folder with nothing else, is read by its own reader; everything else is a folder in the
Hugging Face layout, or a mistake that its reader explains.
"""

from __future__ import annotations

from pathlib import Path

from fastgpt_jax.checkpoint.gguf.model import find_gguf, load_gguf
from fastgpt_jax.checkpoint.huggingface import LoadedModel, load_folder


def load_model(folder: str | Path, *, dtype: str | None = None, max_model_len: int | None = None) -> LoadedModel:
    """Loads a model with its parameters, tokenizer, defaults of generation and chat template.

    Args:
      folder: A Hugging Face folder, a GGUF file, or a folder that holds one.
      dtype: `float32`, `bfloat16` or `float16`; None for the one that the model names, else that of its tensors.
      max_model_len: The longest text that will be served, in tokens; None for the model's own limit, which it cannot
        exceed. It is the limit of the model returned, and decides between the factors of `longrope`.

    Raises:
      UserError: Something in it is missing, damaged or not supported.
    """
    path = Path(folder)
    gguf = find_gguf(path)
    if gguf is not None:
        return load_gguf(gguf, dtype=dtype, max_model_len=max_model_len)
    return load_folder(path, dtype=dtype, max_model_len=max_model_len)
