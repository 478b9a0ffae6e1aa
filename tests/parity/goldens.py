"""The committed goldens: logits of transformers, the config.json they were made with, and how far ours are from them.

Knows neither transformers nor torch. The one idea: a golden becomes a folder such as a user would load.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgpt_jax.checkpoint import LoadedModel, load_model
from fastgpt_jax.checkpoint.safetensors_io import write_safetensors
from tests.parity.weights import make_weights

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def golden_path(name: str) -> Path:
    return next(path for path in GOLDENS if path.stem == name)


def golden_config(path: Path) -> dict[str, Any]:
    """The config.json of a golden."""
    return json.loads(str(np.load(path)["config"]))


def load_golden(path: Path, folder: Path, **options) -> LoadedModel:
    """Writes a golden's model into a folder and loads it, for the length that the golden names or another."""
    golden = np.load(path)
    (folder / "config.json").write_text(str(golden["config"]))
    write_safetensors(folder / "model.safetensors", make_weights(json.loads(str(golden["shapes"]))))
    return load_model(folder, dtype="float32", **{"max_model_len": int(golden["max_model_len"])} | options)


def error_against(path: Path, model: nnx.Module) -> float:
    """The largest difference of logits over the largest logit."""
    golden = np.load(path)
    ours, theirs = np.asarray(forward(model, jnp.asarray(golden["tokens"]))), golden["logits"]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
