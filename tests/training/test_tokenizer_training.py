"""The trained tokenizer is lossless and is written in the Hugging Face layout."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt_jax.errors import UserError
from fastgpt_jax.training.tokenizer_training import END_OF_TEXT, save_tokenizer, train_bpe

TEXT = "But soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 300)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: END_OF_TEXT not in text))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary_has_the_size_asked_for_and_the_special_token_first(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) / 1.5


def test_a_vocabulary_smaller_than_the_bytes_is_a_user_error():
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(TEXT, 256)


def test_saved_files_load_and_encode_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, max_model_len=64)
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == END_OF_TEXT
    assert config["model_max_length"] == 64
