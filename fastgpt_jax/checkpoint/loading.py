"""From a path or a hub's id to a model, whichever of the layouts it has.

The one idea: an id becomes a folder first; then a GGUF file, or a folder with nothing else, is read by its own reader,
and everything else is a folder in the Hugging Face layout, or a mistake that its reader explains.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastgpt_jax.checkpoint.gguf.model import find_gguf, load_gguf
from fastgpt_jax.checkpoint.hub import HubSettings, find_on_hub, parse_model_id
from fastgpt_jax.checkpoint.huggingface import LoadedModel, load_folder


def load_model(
    model: str | Path,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    hub: HubSettings = HubSettings(),
) -> LoadedModel:
    """Loads a model with its parameters, tokenizer, defaults of generation and chat template.

    Args:
      model: A Hugging Face folder, a GGUF file, or a folder that holds one; or the id of a model, `OWNER/NAME` on
        Hugging Face or `modelscope:OWNER/NAME`, either with `@REVISION`. An id is looked up in the local cache, then
        downloaded; what exists as a path is a path.
      dtype: `float32`, `bfloat16` or `float16`; None for the one that the model names, else that of its tensors.
      max_model_len: The longest text that will be served, in tokens; None for the model's own limit, which it cannot
        exceed. It is the limit of the model returned, and decides between the factors of `longrope`.
      hub: Where ids are looked up.

    Raises:
      UserError: Something in it is missing, damaged or not supported, or an id is nowhere to be had.
    """
    model_id = parse_model_id(model)
    if model_id is not None:
        folder = find_on_hub(model_id, hub)
        # A cache calls folders by digests.
        loaded = load_model(folder, dtype=dtype, max_model_len=max_model_len)
        return dataclasses.replace(loaded, name=model_id.name)
    path = Path(model)
    gguf = find_gguf(path)
    if gguf is not None:
        return load_gguf(gguf, dtype=dtype, max_model_len=max_model_len)
    return load_folder(path, dtype=dtype, max_model_len=max_model_len)
