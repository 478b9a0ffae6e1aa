"""From a model's id to its folder on disk."""

from __future__ import annotations

from pathlib import Path

from fastgpt_jax.checkpoint.hub.huggingface import find_on_huggingface
from fastgpt_jax.checkpoint.hub.model_id import HubSettings, ModelId
from fastgpt_jax.checkpoint.hub.modelscope import find_on_modelscope


def find_on_hub(model: ModelId, settings: HubSettings = HubSettings()) -> Path:
    """The model's folder: the cached one where it is whole, without the network; else downloaded into the cache.

    Raises:
      UserError: It is not in the cache and cannot be fetched.
    """
    find = find_on_modelscope if model.hub == "modelscope" else find_on_huggingface
    return find(model, settings)
