"""From a text to a servable folder, on a model of a few thousand parameters."""

import dataclasses
import json

import numpy as np
import pytest

from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.errors import UserError
from fastgpt_jax.training import TrainSettings, train_from_text

TEXT = "".join(f"SPEAKER {i % 7}:\nWhat light is that, number {i % 10}?\n\n" for i in range(200))
SETTINGS = TrainSettings.from_mapping(
    {
        "name": "tiny",
        "steps": 6,
        "log_every_steps": 1,
        "evaluate_every_steps": 3,
        "checkpoint_every_steps": 3,
        "tokenizer": {"vocab_size": 280},
        "data": {"window_tokens": 16, "batch_size": 4},
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 32,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
    }
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, train_from_text(TEXT, SETTINGS, output)


def test_the_loss_falls_and_is_reported(run):
    output, result = run
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] == result.train_loss < losses[0]
    assert [entry["step"] for entry in entries if "valid_loss" in entry] == [3, 6]
    assert result.valid_bits_per_byte < 8.0


def test_the_folder_loads_with_tokenizer_and_end_of_text(run):
    _, result = run
    loaded = load_model(result.folder)
    assert loaded.config.max_position_embeddings == 32
    assert loaded.vocab_size == 280
    assert loaded.generation.eos_token_ids == (0,)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(TEXT)) == TEXT
    assert loaded.chat_template is not None


def test_a_run_stopped_at_a_checkpoint_and_resumed_writes_the_same_model(run, tmp_path):
    output, result = run
    # As if killed after step 3: the log holds a line that no checkpoint covers.
    (output / "checkpoints" / "3").rename(tmp_path / "3")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "3").rename(tmp_path / "checkpoints" / "3")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n')
    resumed = train_from_text(TEXT, SETTINGS, tmp_path, resume=True)
    assert resumed.valid_loss == result.valid_loss
    first, second = (folder / "model.safetensors" for folder in (result.folder, resumed.folder))
    np.testing.assert_array_equal(np.frombuffer(first.read_bytes(), "u1"), np.frombuffer(second.read_bytes(), "u1"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5, 6, 6]


def test_a_folder_that_holds_a_run_is_not_overwritten(run):
    output, _ = run
    with pytest.raises(UserError, match="already holds a run"):
        train_from_text(TEXT, SETTINGS, output)


def test_resuming_where_nothing_is_and_texts_too_short_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train_from_text(TEXT, SETTINGS, tmp_path / "a", resume=True)
    with pytest.raises(UserError, match="use a longer text"):
        train_from_text("To be.", SETTINGS, tmp_path / "b")


def test_the_loss_curve_is_a_small_picture(run):
    pytest.importorskip("matplotlib", reason="the picture needs the extra `train`")
    output, _ = run
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_head_dimensions_that_do_not_fit_are_named(tmp_path):
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, num_key_value_heads=3))
    with pytest.raises(UserError, match="multiple of KV heads"):
        train_from_text(TEXT, settings, tmp_path)


def test_an_output_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder .*file/run: Not a directory; choose another --output"):
        train_from_text(TEXT, SETTINGS, tmp_path / "file" / "run")
