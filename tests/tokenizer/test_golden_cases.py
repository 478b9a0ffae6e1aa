"""Real tokenizers on llama.cpp's golden texts, from the files of each layout."""

import functools
import json
import shutil

import pytest

from fastgpt_jax.checkpoint.gguf import GGUFFile
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.tokenizer import load_tokenizer
from fastgpt_jax.tokenizer.gguf import make_gguf_tokenizer
from tests.shared_data import shared_path

NUM_CASES = 46
FOLDERS = [("gpt2", "gpt-2", {}), ("qwen2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}), ("phi-3", "phi-3", {})]
GGUF_FILES = ["gpt-2", "phi-3", "deepseek-llm"]


def load_folder(name, config, folder):
    for path in shared_path(f"tokenizers/{name}").iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@functools.cache
def load_gguf_tokenizer(name):
    file = GGUFFile(shared_path(f"tokenizers/ggml-vocab-{name}.gguf"))
    return make_gguf_tokenizer(Fields(file.metadata, name))


def read_cases(name):
    base = shared_path("tokenizers") / f"ggml-vocab-{name}.gguf"
    texts = base.with_name(base.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = base.with_name(base.name + ".out").read_text().splitlines()
    return list(zip(texts, [[int(word) for word in line.split()] for line in lines], strict=True))


def check(tokenizer, cases):
    assert len(cases) == NUM_CASES
    assert not [text for text, ids in cases if tokenizer.encode(text, add_special_tokens=False) != ids]


@pytest.mark.parametrize(("name", "golden", "config"), FOLDERS, ids=[case[0] for case in FOLDERS])
def test_golden_texts_encode_to_their_ids(name, golden, config, tmp_path):
    check(load_folder(name, config, tmp_path), read_cases(golden))


@pytest.mark.parametrize("name", GGUF_FILES)
def test_golden_texts_encode_to_their_ids_from_a_gguf_vocabulary_and_decode_to_themselves(name):
    tokenizer, cases = load_gguf_tokenizer(name), read_cases(name)
    check(tokenizer, cases)
    assert not [text for text, _ in cases if tokenizer.decode(tokenizer.encode(text)) != text]


def test_merges_from_scores_are_those_of_the_models_own_tokenizer_json():
    listed = json.loads((shared_path("tokenizers/phi-3") / "tokenizer.json").read_text())["model"]["merges"]
    made = json.loads(load_gguf_tokenizer("phi-3")._backend.to_str())["model"]["merges"]
    assert len(listed) == 61249
    assert [tuple(merge) for merge in made] == [tuple(merge.split(" ")) for merge in listed]


def test_special_tokens_of_a_gguf_vocabulary():
    phi = load_gguf_tokenizer("phi-3")
    assert (phi.bos_token, phi.eos_token, phi.encode("a")[0]) == ("<s>", "<|endoftext|>", 1)
    assert phi.encode("<|user|>", add_special_tokens=False) == [32010]
    deepseek = load_gguf_tokenizer("deepseek-llm")
    assert (deepseek.eos_token, deepseek.encode("a")[0]) == ("<｜end▁of▁sentence｜>", 100000)
    gpt2 = load_gguf_tokenizer("gpt-2")
    assert gpt2.encode("a", add_special_tokens=True) == gpt2.encode("a", add_special_tokens=False)
