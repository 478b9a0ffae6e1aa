"""Models by their ids on Hugging Face and ModelScope: from the local caches, else downloaded into them."""

from fastgpt_jax.checkpoint.hub.find import find_on_hub
from fastgpt_jax.checkpoint.hub.model_id import HubSettings, ModelId, parse_model_id

__all__ = ["HubSettings", "ModelId", "find_on_hub", "parse_model_id"]
