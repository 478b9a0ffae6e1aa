"""Our logits are those of transformers, through the same files a user would load."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.checkpoint.safetensors_io import write_safetensors
from tests.parity.weights import make_weights

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.npz"))


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def write_golden_folder(folder: Path, golden) -> None:
    config = json.loads(str(golden["config"]))
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", make_weights(json.loads(str(golden["shapes"]))))


def relative_error(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_logits_equal_those_of_transformers(path, tmp_path, strict_jax):
    golden = np.load(path)
    write_golden_folder(tmp_path, golden)
    loaded = load_model(tmp_path, dtype="float32")
    logits = np.asarray(forward(loaded.model, jnp.asarray(golden["tokens"])))
    # Float32 on both sides; measured 2e-6 at worst (x86, jax 0.10.2).
    assert relative_error(logits, golden["logits"]) < 1e-4


@pytest.mark.parametrize("name", ["llama_linear", "llama_llama3", "llama_yarn", "llama_yarn_mscale"])
def test_golden_can_tell_whether_rope_is_scaled(name, tmp_path):
    golden = np.load(next(path for path in GOLDENS if path.stem == name))
    write_golden_folder(tmp_path, golden)
    model = load_model(tmp_path, dtype="float32").model
    model.config = dataclasses.replace(model.config, rope_scaling=None)
    logits = np.asarray(forward(model, jnp.asarray(golden["tokens"])))
    assert relative_error(logits, golden["logits"]) > 1e-2


def test_every_family_and_scaling_has_a_golden():
    assert {path.stem for path in GOLDENS} >= {"llama", "llama_linear", "llama_llama3", "llama_yarn", "qwen2", "gpt2"}
