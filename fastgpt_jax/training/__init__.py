"""Training of small models: text in, a Hugging Face folder out."""

from fastgpt_jax.training.loop import TrainState, train
from fastgpt_jax.training.recipe import TrainResult, train_from_text
from fastgpt_jax.training.settings import TrainSettings

__all__ = ["TrainResult", "TrainSettings", "TrainState", "train", "train_from_text"]
