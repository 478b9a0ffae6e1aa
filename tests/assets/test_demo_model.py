"""The embedded default model: it loads, it is small, it has learned its text, and its README tells the truth."""

import hashlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.training import TrainSettings
from fastgpt_jax.training.loop import next_token_loss

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "fastgpt_jax" / "assets" / "demo"
TEXT = ROOT.parent / "shared" / "data" / "corpora" / "tinyshakespeare.txt"
# From the validation part, which the model has not seen.
SNIPPET = """GREMIO:
Good morrow, neighbour Baptista.

BAPTISTA:
Good morrow, neighbour Gremio.
God save you, gentlemen!
"""


@pytest.fixture(scope="module")
def loaded():
    return load_model(FOLDER, dtype="float32")


def test_the_folder_is_at_most_one_and_a_half_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 1_500_000


def test_it_is_the_model_of_its_config(loaded):
    settings = TrainSettings.from_mapping(demo.get_config().to_dict())
    assert loaded.vocab_size == loaded.tokenizer.vocab_size == settings.tokenizer.vocab_size
    assert {name: getattr(loaded.config, name) for name in vars(settings.model)} == vars(settings.model)
    assert loaded.generation.eos_token_ids == (loaded.tokenizer.encode("<|endoftext|>")[0],)


def test_the_tokenizer_gives_back_what_it_is_given(loaded):
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(SNIPPET + "héllo 🎭")) == SNIPPET + "héllo 🎭"


def test_it_has_learned_how_plays_are_written(loaded):
    ids = jnp.asarray([loaded.tokenizer.encode(SNIPPET)])
    loss = float(jax.jit(lambda ids: next_token_loss(lambda _, tokens: loaded.model(tokens), None, ids))(ids))
    untrained = np.log(loaded.vocab_size)
    assert loss < 0.6 * untrained


def test_the_readme_names_the_text_that_it_was_trained_on():
    if not TEXT.is_file():
        pytest.skip(f"the training text is not committed and not at {TEXT}")
    readme = (FOLDER / "README.md").read_text()
    assert re.findall(r"\b[0-9a-f]{64}\b", readme) == [hashlib.sha256(TEXT.read_bytes()).hexdigest()]
