"""Models on disk: the Hugging Face layout and GGUF read into Flax NNX modules, the first of them written too."""

from fastgpt_jax.checkpoint.export import export_model
from fastgpt_jax.checkpoint.hub import HubSettings, parse_model_id
from fastgpt_jax.checkpoint.huggingface import LoadedModel
from fastgpt_jax.checkpoint.loading import load_model
from fastgpt_jax.generation import GenerationDefaults

__all__ = ["GenerationDefaults", "HubSettings", "LoadedModel", "export_model", "load_model", "parse_model_id"]
