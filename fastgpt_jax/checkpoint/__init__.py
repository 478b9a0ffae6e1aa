"""Models on disk: the Hugging Face layout read into Flax NNX modules, and written."""

from fastgpt_jax.checkpoint.export import export_model
from fastgpt_jax.checkpoint.huggingface import LoadedModel, load_model
from fastgpt_jax.generation import GenerationDefaults

__all__ = ["GenerationDefaults", "LoadedModel", "export_model", "load_model"]
