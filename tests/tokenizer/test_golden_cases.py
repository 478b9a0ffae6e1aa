"""Real tokenizers on llama.cpp's golden texts."""

import json
import shutil

import pytest

from fastgpt_jax.tokenizer import load_tokenizer
from tests.shared_data import shared_path

CASES = [("gpt2", "gpt-2", {}), ("qwen2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}), ("phi-3", "phi-3", {})]


def load_shared_tokenizer(name, config, folder):
    for path in shared_path(f"tokenizers/{name}").iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def read_cases(name):
    base = shared_path("tokenizers") / f"ggml-vocab-{name}.gguf"
    texts = base.with_name(base.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = base.with_name(base.name + ".out").read_text().splitlines()
    return list(zip(texts, [[int(word) for word in line.split()] for line in lines], strict=True))


@pytest.mark.parametrize(("name", "golden", "config"), CASES, ids=[case[0] for case in CASES])
def test_golden_texts_encode_to_their_ids(name, golden, config, tmp_path):
    tokenizer = load_shared_tokenizer(name, config, tmp_path)
    cases = read_cases(golden)
    assert len(cases) >= 46
    wrong = [text for text, ids in cases if tokenizer.encode(text, add_special_tokens=False) != ids]
    assert not wrong
