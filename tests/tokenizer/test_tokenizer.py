"""Encoding, decoding, special tokens and the files of a tokenizer."""

import json
import subprocess
import sys

import pytest
import tokenizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer import Tokenizer, load_tokenizer
from tests.shared_data import shared_path
from tests.tokenizer.tokenizers_to_try import MAKERS, make_byte_fallback, make_byte_level


def write_tokenizer(folder, tokenizer, **config):
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_level"])
@pytest.mark.parametrize("text", ["", "a", "a b", "世界 🚀\n", "  two  spaces  "])
def test_decoding_undoes_encoding(kind, text):
    tokenizer = MAKERS[kind]()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_is_added_once_and_only_where_asked_for():
    tokenizer = make_byte_fallback()
    assert tokenizer.encode("a")[:1] == [1]
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("<s>a").count(1) == 1


def test_bos_of_the_post_processor_is_not_doubled(tmp_path):
    tokenizer = make_byte_fallback()
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    tokenizer._backend.post_processor = template
    write_tokenizer(tmp_path, tokenizer, bos_token="<s>", add_bos_token=True)
    assert load_tokenizer(tmp_path).encode("a").count(1) == 1


def test_add_bos_token_holds_where_no_post_processor_does_it(tmp_path):
    write_tokenizer(tmp_path, make_byte_fallback(), bos_token={"content": "<s>"}, add_bos_token=True)
    assert load_tokenizer(tmp_path).encode("a")[0] == 1
    write_tokenizer(tmp_path, make_byte_fallback(), bos_token="<s>")
    assert load_tokenizer(tmp_path).encode("a")[0] != 1


def test_special_tokens_come_from_the_config_then_from_the_map(tmp_path):
    write_tokenizer(tmp_path, make_byte_fallback(), eos_token="</s>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<unk>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_special_tokens_are_skipped_and_other_added_tokens_are_not():
    tokenizer = make_byte_level()
    ids = tokenizer.encode("a<tool><|end|>b")
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<tool><|end|>b"


def test_ids_outside_the_vocabulary_have_no_text():
    tokenizer = make_byte_level()
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size, 2**40, -1]) == "a"


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path):
    backend = make_byte_level()._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcde")) == 5


def test_text_that_is_not_unicode_is_a_user_error():
    with pytest.raises(UserError, match="valid Unicode"):
        make_byte_level().encode("a\udcff")


def test_folder_without_a_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_damaged_files_are_user_errors(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json as a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("[")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_added_token_with_an_impossible_id_is_a_user_error(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = {"added_tokens_decoder": {"7": {"content": "<x>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'<x>' as token 7"):
        load_tokenizer(tmp_path)
    config = {"added_tokens_decoder": {"2": {"content": "<x>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).special_token_ids == {2}


def test_golden_prompts_of_the_shared_model_encode_to_their_ids():
    folder = shared_path("models/stories260K")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, Tokenizer)
    for case in json.loads((folder / "golden.json").read_text()):
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]


def test_importing_the_tokenizer_imports_neither_jax_nor_flax():
    code = "import sys, fastgpt_jax.tokenizer; print(sorted({'jax', 'flax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
