"""`fastgpt train` from flags to a folder, and its mistakes."""

import json

import pytest

from fastgpt_jax.cli.config_file import load_config, merge
from fastgpt_jax.cli.train import main
from fastgpt_jax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "steps": 2, "tokenizer": {"vocab_size": 260}, "data": {"window_tokens": 8, "batch_size": 2},
        "optimizer": {"warmup_steps": 0},
        "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                  "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 8},
    })
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("To be, or not to be.\n\n" * 40)
    return tmp_path


def arguments(folder, *more):
    return ["--config", f"{folder}/config.py", "--text", f"{folder}/text.txt", "--output", f"{folder}/out", *more]


@pytest.mark.slow
def test_a_model_is_trained_and_its_folder_printed(files, capsys):
    assert main(arguments(files, "--config.steps=3", "--config.optimizer.learning-rate", "0.01")) == 0
    out, err = capsys.readouterr()
    folder = files / "out" / "model"
    assert out == f"{folder}\n"
    assert "validation loss" in err
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 8
    assert '"step": 3' in (files / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.stesp=3"], "Unknown command line flag 'config.stesp'. Did you mean: config.steps"),
        (["--config.steps=many"], "config.steps=many"),
        (["--config.steps=0"], "steps must be at least 1, got 0"),
        (["--text=nowhere.txt"], "no such text file: nowhere.txt"),
        (["--config=nowhere.py"], "no such config file: nowhere.py"),
        (["--resume"], "there is nothing to resume"),
        (["--config.model.num_key_value_heads=3"], "multiple of KV heads"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(files, capsys, more, message):
    assert main(arguments(files, *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgpt train: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("def get_config(): return []", "must return a ConfigDict, got list"),
    ],
)
def test_a_config_file_that_fails_is_named(tmp_path, source, message):
    (tmp_path / "config.py").write_text(source)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "config.py")
    assert str(tmp_path / "config.py") in str(caught.value)


def test_overrides_leave_the_config_as_it_was():
    config = {"a": {"b": 1, "c": 2}}
    assert merge(config, {"a.b": 5, "d.e": 6}) == {"a": {"b": 5, "c": 2}, "d": {"e": 6}}
    assert config == {"a": {"b": 1, "c": 2}}
