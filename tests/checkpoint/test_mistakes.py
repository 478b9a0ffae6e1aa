"""Every way in which a folder can be wrong is one clear line."""

import json
import struct

import numpy as np
import pytest

from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from fastgpt_jax.errors import UserError
from tests.checkpoint.folders import edit_json, make_folder, split_into_shards


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path)
    return tmp_path


def assert_refused(folder, *needles):
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


def rewrite_tensors(folder, change):
    """Applies `change` to the dict of tensors and writes it back."""
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.entries}
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def test_no_such_folder_and_not_a_folder(folder):
    assert_refused(folder / "nowhere", "no such folder", "nowhere")
    assert_refused(folder / "config.json", "must be a folder", "it is a file")


def test_no_config_and_damaged_config(folder):
    (folder / "config.json").write_text("{")
    assert_refused(folder, "config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    assert_refused(folder, "must hold a JSON object, got list")
    (folder / "config.json").unlink()
    assert_refused(folder, "no config.json")


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("LlamaForCausalML", "'LlamaForCausalLM'"),
        ("Qwen4ForCausalLM", "'Qwen3ForCausalLM'"),
        ("x", "nearest supported"),
    ],
)
def test_unsupported_architecture_names_the_nearest(folder, architecture, nearest):
    edit_json(folder / "config.json", architectures=[architecture])
    assert_refused(folder, repr(architecture), nearest)


def test_model_type_decides_where_no_architecture_is_named(folder):
    edit_json(folder / "config.json", architectures=None)
    assert load_model(folder).vocab_size == 23
    edit_json(folder / "config.json", model_type="lama")
    assert_refused(folder, "'lama'", "'llama'")
    edit_json(folder / "config.json", model_type=None)
    assert_refused(folder, "must give model_type")


@pytest.mark.parametrize(
    ("fields", "needles"),
    [
        ({"hidden_size": None}, ["must give hidden_size", "missing"]),
        ({"hidden_size": "16"}, ["hidden_size", "'16'"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers as a positive integer, got 0"]),
        ({"num_key_value_heads": 3}, ["multiple of KV heads", "N=4 and K=3"]),
        ({"head_dim": None, "num_attention_heads": 3}, ["no head_dim", "16 and 3"]),
        ({"hidden_act": "swish2"}, ["hidden_act='swish2'", "silu"]),
        ({"rope_theta": 0.5}, ["rope_theta > 1"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"eos_token_id": "end"}, ["eos_token_id", "'end'"]),
        ({"torch_dtype": "float8"}, ["dtype", "'float8'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized (gptq)"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
    ids=str,
)
def test_wrong_fields_are_named(folder, fields, needles):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **fields)
    assert_refused(folder, *needles)


@pytest.mark.parametrize(
    ("scaling", "needles"),
    [
        ({"type": "dynamic", "factor": 2.0}, ["'dynamic'", "depend on the length"]),
        ({"rope_type": "longrope"}, ["original_max_position_embeddings", "missing"]),
        ({"rope_type": "yarm", "factor": 2.0}, ["'yarm'", "'yarn'"]),
        ({"rope_type": "linear"}, ["factor", "missing"]),
        ({"rope_type": "linear", "factor": -1}, ["factor > 0"]),
        ("linear", ["rope_scaling", "object"]),
    ],
    ids=str,
)
def test_rope_scalings_are_refused_by_name(folder, scaling, needles):
    edit_json(folder / "config.json", rope_scaling=scaling)
    assert_refused(folder, *needles)


def test_sliding_windows_of_qwen2_must_be_off(folder):
    edit_json(folder / "config.json", architectures=["Qwen2ForCausalLM"], use_sliding_window=True)
    assert_refused(folder, "use_sliding_window=True")


def test_missing_weights_name_what_is_there_instead(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "has no weights", "model.safetensors")
    (folder / "pytorch_model.bin").touch()
    assert_refused(folder, "pytorch_model.bin is there, convert it")


@pytest.mark.parametrize(
    "kept", [0, 4, 100, 0.5, -1], ids=["nothing", "no length", "no header", "half", "all but a byte"]
)
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert_refused(folder, "model.safetensors is truncated")


@pytest.mark.parametrize(
    ("data", "needle"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"z" * 40, "not a safetensors file"),
        (struct.pack("<Q", 4) + b"oops", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "not a safetensors file"),
    ],
)
def test_files_that_are_not_safetensors(folder, data, needle):
    (folder / "model.safetensors").write_bytes(data)
    assert_refused(folder, needle)


def test_shards_that_are_missing_or_do_not_hold_what_the_index_says(folder):
    first, second = split_into_shards(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, shard in weight_map.items() if shard == second)
    edit_json(index, weight_map=weight_map | {moved: first})
    assert_refused(folder, f"promises {moved} in {first}")
    edit_json(index, weight_map=weight_map | {moved: "../" + second})
    assert_refused(folder, "its own folder")
    edit_json(index, weight_map=weight_map)
    (folder / second).unlink()
    assert_refused(folder, f"names the shard {second}, which is missing")
    edit_json(index, weight_map={})
    assert_refused(folder, "no weight_map")


def test_missing_extra_and_misshapen_tensors(folder):
    norm = "model.norm.weight"
    rewrite_tensors(folder, lambda tensors: tensors.update({norm: np.ones(15, np.float32)}))
    assert_refused(folder, f"{norm} of shape (16,)", "(15,)")
    rewrite_tensors(folder, lambda tensors: tensors.update({norm: np.ones(16, np.int8)}))
    assert_refused(folder, f"{norm} has dtype I8")
    rewrite_tensors(folder, lambda tensors: tensors.pop(norm))
    assert_refused(folder, f"lacks tensor {norm}")
    rewrite_tensors(folder, lambda tensors: tensors.update({norm: np.ones(16, np.float32), "extra": np.ones(1)}))
    assert_refused(folder, "holds tensor extra", "LlamaForCausalLM")


def test_weights_of_more_layers_than_the_config_has(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert_refused(folder, "model.layers.1.", "6 more tensors")
