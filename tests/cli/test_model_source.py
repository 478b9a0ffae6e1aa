"""A user's own file: found, called, and every way it can go wrong told in one line."""

from __future__ import annotations

import huggingface_hub.constants  # noqa: F401 - reads the environment once, before a test changes it
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from fastgpt_jax.checkpoint import HubSettings
from fastgpt_jax.checkpoint.safetensors_io import write_safetensors
from fastgpt_jax.cli import generate
from fastgpt_jax.cli.model_source import hub_settings, is_function_spec, load_source, trace_source
from fastgpt_jax.errors import UserError
from tests.checkpoint.folders import make_folder

GOOD = """
import jax.numpy as jnp
def make_model():
    params = {"embed": jnp.zeros((4, 2)), "layers": [{"w": jnp.ones((2, 4), jnp.bfloat16)}]}
    return (lambda params, tokens: params["embed"][tokens] @ params["layers"][0]["w"]), params
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="model.py"):
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:make_model"

    return write_file


def test_a_file_gives_its_function_and_parameters(write):
    source = load_source(write(GOOD))
    assert callable(source.model) and source.tokenizer is None and source.max_model_len is None
    assert source.params["embed"].shape == (4, 2)


def test_a_module_on_the_path_is_found(write, tmp_path, monkeypatch):
    write(GOOD, "my_served_module.py")
    monkeypatch.chdir(tmp_path)
    assert load_source("my_served_module:make_model").params["embed"].shape == (4, 2)


def test_a_file_may_import_its_neighbour(write):
    write("SIZE = 3", "my_neighbour.py")
    assert load_source(write("from my_neighbour import SIZE\ndef make_model():\n  return (len, SIZE)")).params == 3


def test_tracing_makes_shapes_and_no_weights(write):
    source = trace_source(write(GOOD))
    assert isinstance(source.params["embed"], jax.ShapeDtypeStruct)
    assert source.params["layers"][0]["w"].dtype == jnp.bfloat16 and callable(source.model)


def test_tracing_a_module_makes_no_weights(write):
    text = "from flax import nnx\ndef make_model():\n  return nnx.Linear(10**6, 10**6, rngs=nnx.Rngs(0)), None"
    source = trace_source(write(text))
    leaves = jax.tree.leaves(nnx.state(source.model))
    assert len(leaves) == 2 and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass", "has no 'make_model'"),
        ("make_model = 3", "int, not a function"),
        ("def make_model(:", "SyntaxError"),
        ("import not_there_at_all", "ModuleNotFoundError"),
        ("def make_model():\n  raise KeyError('w')", "KeyError: 'w'"),
        ("import sys\nsys.exit(0)", "cannot be imported: SystemExit: 0"),
        ("def make_model():\n  raise SystemExit", "failed with SystemExit"),
        ("def make_model():\n  return len, {'a': ['x']}", "with a str at 'a.0'"),
        ("def make_model():\n  return 3", "returned a int; it must return (fn, params)"),
        ("def make_model():\n  return (1, 2, 3, 4)", "returned a tuple of 4"),
        ("def make_model():\n  return 'fn', {}", "returned a str first, which cannot be called"),
        ("def make_model():\n  return len, {}, 5", "a int as tokenizer, which has no encode"),
        ("def make_model():\n  return len, {}, '/nowhere'", "no such tokenizer folder: /nowhere"),
    ],
)
def test_what_a_file_does_wrong_is_one_line(write, text, message):
    with pytest.raises(UserError) as error:
        load_source(write(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_failure_names_the_users_line(write):
    spec = write("import jax.numpy as jnp\ndef make_model():\n  return jnp.zeros((2,)) @ jnp.zeros((3,)), {}")
    with pytest.raises(UserError, match=r"model\.py:3\)"):
        load_source(spec)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("/nowhere", {}, "no such folder: /nowhere"),
        ("/nowhere.py:make_model", {}, "no such file: /nowhere.py"),
        ("no_such_module:make_model", {}, "module 'no_such_module' cannot be imported"),
        ("/some/model.py", {}, "as in --model /some/model.py:make_model"),
        ("/nowhere", {"params": "p"}, "--params goes with --model FILE.py:FUNCTION"),
        ("a:b", {"dtype": "float32"}, "--dtype is for model folders"),
    ],
)
def test_what_the_flags_get_wrong_is_one_line(model, options, message):
    with pytest.raises(UserError) as error:
        load_source(model, **options)
    assert message in str(error.value)


ARRAYS = {"embed": np.arange(8, dtype=np.float32).reshape(4, 2), "layers.0.w": np.full((2, 4), 3, np.float32)}


@pytest.mark.parametrize("separator", [".", "/"])
def test_safetensors_take_the_place_of_the_parameters(write, tmp_path, separator):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {name.replace(".", separator): array for name, array in ARRAYS.items()})
    params = load_source(write(GOOD), str(path)).params
    np.testing.assert_array_equal(params["embed"], ARRAYS["embed"])
    assert params["layers"][0]["w"].dtype == jnp.bfloat16 and float(params["layers"][0]["w"][0, 0]) == 3


def test_an_orbax_folder_takes_the_place_of_the_parameters(write, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ckpt", {"embed": ARRAYS["embed"], "layers": [{"w": ARRAYS["layers.0.w"]}]})
    params = load_source(write(GOOD), str(tmp_path / "ckpt")).params
    np.testing.assert_array_equal(params["embed"], ARRAYS["embed"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embed": ARRAYS["embed"]}, "lacks layers.0.w"),
        ({**ARRAYS, "head": ARRAYS["embed"]}, "adds head"),
        ({**ARRAYS, "embed": np.zeros((4, 3), np.float32)}, "embed has shape (4, 3), the model's has (4, 2)"),
        ({**ARRAYS, "embed": np.zeros((4, 2), np.int32)}, "embed has dtype int32"),
    ],
)
def test_parameters_of_another_model_are_refused(write, tmp_path, arrays, message):
    write_safetensors(tmp_path / "w.safetensors", arrays)
    with pytest.raises(UserError) as error:
        load_source(write(GOOD), str(tmp_path / "w.safetensors"))
    assert message in str(error.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"x")])
def test_a_file_that_holds_no_parameters_is_one_line(write, tmp_path, make):
    make(tmp_path / "weights")
    with pytest.raises(UserError) as error:
        load_source(write(GOOD), str(tmp_path / "weights"))
    assert "\n" not in str(error.value) and "weights" in str(error.value)


def test_hub_ids_are_no_functions_and_their_settings_come_from_the_environment(tmp_path):
    assert not is_function_spec("modelscope:org/name") and not is_function_spec("org/name")
    assert is_function_spec("module:function") and is_function_spec("folder/file.py:function")
    assert hub_settings({}) == HubSettings()
    variables = {"MODELSCOPE_CACHE": str(tmp_path), "MODELSCOPE_DOMAIN": "example.org", "HF_HUB_OFFLINE": "1"}
    expected = HubSettings(modelscope_cache=tmp_path, modelscope_endpoint="https://example.org", is_offline=True)
    assert hub_settings(variables) == expected


@pytest.mark.parametrize("model", ["org/no-such-name", "modelscope:org/no-such-name"])
def test_an_id_without_a_network_is_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    assert generate.main(["--model", model, "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{model} " in line and "working offline was asked for" in line and "give the path" in line


def test_a_model_in_the_local_cache_is_loaded_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    make_folder(tmp_path / "models" / "org" / "name")
    source = load_source("modelscope:org/name")
    assert (source.model.name, source.max_model_len) == ("name", 32)
