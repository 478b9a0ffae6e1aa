"""What was written is what is read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from fastgpt_jax.checkpoint import GenerationDefaults, export_model, load_model
from fastgpt_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import GPT2, GPT2Config
from fastgpt_jax.models.layers.rope import LinearScaling, Llama3Scaling, YarnScaling
from tests.checkpoint.folders import CONFIG, edit_json, make_folder, split_into_shards
from tests.filled_model import make_filled_model
from tests.models.families import FAMILIES

SCALINGS = {
    "none": None,
    "linear": LinearScaling(2.0),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 16),
    "yarn": YarnScaling(4.0, 16, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
}


def assert_same_parameters(left, right):
    left, right = nnx.state(left), nnx.state(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, False)], ids=str)
def test_llama_and_qwen2_come_back_as_they_were(tmp_path, scaling, biases):
    attention, output, mlp = biases
    config = dataclasses.replace(
        CONFIG,
        rope_scaling=SCALINGS[scaling],
        attention_bias=attention,
        attention_output_bias=output,
        mlp_bias=mlp,
        tie_word_embeddings=mlp,
    )
    model = make_folder(tmp_path, config)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert_same_parameters(loaded.model, model)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_gpt2_comes_back_with_and_without_the_prefix_and_buffers_are_ignored(tmp_path, has_prefix):
    config = GPT2Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = make_filled_model(GPT2, config)
    export_model(model, config, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 4, 4), bool)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    if not has_prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert_same_parameters(loaded.model, model)


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3", "gemma2", "gemma3", "bloom"])
def test_every_family_comes_back_as_it_was(tmp_path, name):
    module, config = FAMILIES[name]
    model = make_filled_model(module, config)
    export_model(model, config, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert type(loaded.model) is module
    assert_same_parameters(loaded.model, model)


@pytest.mark.parametrize(("name", "fused"), [("gpt2", "transformer.h.1.attn.c_attn"), ("phi3", "self_attn.qkv_proj")])
def test_fused_tensors_hold_their_parts_in_order(tmp_path, name, fused):
    module, config = FAMILIES[name]
    model = make_filled_model(module, config)
    export_model(model, config, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (written,) = (tensor for key, tensor in tensors.items() if key.endswith(f"{fused}.weight") and "0" not in key)
    attention = model.layers[1].attention
    kernels = [layer.kernel[...] for layer in (attention.query, attention.key, attention.value)]
    expected = np.concatenate(kernels, axis=1)
    np.testing.assert_array_equal(written, expected.T if name == "phi3" else expected)


def test_shards_load_as_one_file_does(tmp_path):
    model = make_folder(tmp_path)
    split_into_shards(tmp_path)
    assert_same_parameters(load_model(tmp_path).model, model)


def test_dtype_is_the_one_asked_for_then_the_configs_then_the_tensors(tmp_path):
    make_folder(tmp_path, dtype="bfloat16")
    assert load_model(tmp_path).config.dtype == "bfloat16"
    assert load_model(tmp_path, dtype="float32").config.dtype == "float32"
    edit_json(tmp_path / "config.json", torch_dtype="float16")
    assert load_model(tmp_path).model.norm.weight.dtype == jnp.float16
    edit_json(tmp_path / "config.json", torch_dtype=None)
    assert load_model(tmp_path).model.norm.weight.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        load_model(tmp_path, dtype="int8")


def test_bfloat16_parameters_come_back_exactly(tmp_path):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert_same_parameters(make_folder(tmp_path, config, dtype="bfloat16"), load_model(tmp_path).model)


def test_generation_defaults_come_from_generation_config_then_config(tmp_path):
    make_folder(tmp_path, eos_token_ids=(3, 4), bos_token_id=1)
    assert load_model(tmp_path).generation == GenerationDefaults(32, (3, 4), 1, None)
    edit_json(tmp_path / "generation_config.json", eos_token_id=7, pad_token_id=0)
    assert load_model(tmp_path).generation == GenerationDefaults(32, (7,), 1, 0)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", eos_token_id=5, bos_token_id=None)
    assert load_model(tmp_path).generation == GenerationDefaults(32, (5,), None, None)


def test_folder_without_a_tokenizer_loads(tmp_path):
    make_folder(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.tokenizer, loaded.chat_template, loaded.vocab_size) == (None, None, 23)
    assert loaded.name == tmp_path.name


def test_rope_parameters_and_the_older_spellings_mean_the_same(tmp_path):
    make_folder(tmp_path)
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    path = tmp_path / "config.json"
    edit_json(path, rope_theta=500.0, rope_scaling=yarn | {"type": "yarn"})
    old = load_model(tmp_path).config
    edit_json(
        path, rope_theta=None, rope_scaling=None, rope_parameters=yarn | {"rope_type": "yarn", "rope_theta": 500.0}
    )
    assert load_model(tmp_path).config == old
    assert (old.rope_theta, old.rope_scaling) == (500.0, YarnScaling(4.0, 16))


def test_safetensors_agree_with_the_library(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.float16),
        "c": np.zeros((0, 4), np.float32),
        "d": np.arange(5, dtype=np.int8),
    }
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    for name, tensor in safetensors.numpy.load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype


def test_exported_config_names_the_family(tmp_path):
    make_folder(tmp_path, dataclasses.replace(CONFIG, attention_bias=True))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
    with pytest.raises(UserError, match="neither Llama nor Qwen2"):
        make_folder(tmp_path, dataclasses.replace(CONFIG, attention_output_bias=True))
