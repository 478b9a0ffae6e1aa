"""The example trains, and what is served is what its forward says."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fastgpt_jax

PATH = Path(__file__).parents[2] / "examples" / "serve_your_own.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve_your_own", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_about_45_lines():
    lines = PATH.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("VOCAB"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# ---- training"))
    assert sum(bool(line.strip()) for line in lines[begin:end]) <= 45


@pytest.mark.slow
def test_training_lowers_the_loss(example, capsys):
    fn, params = example.make_model()
    example.train(params, b"To be, or not to be: that is the question. " * 10, 8)
    lines = capsys.readouterr().err.splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < losses[0]


def test_served_bytes_are_those_of_the_forward_past_the_window(example):
    fn, params = example.make_model()
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 256, example.WINDOW + 10)]
    config = fastgpt_jax.CompileConfig(max_model_len=128, max_num_seqs=2)
    llm = fastgpt_jax.LLM(fastgpt_jax.compile(fn, params, config))
    sampling = fastgpt_jax.SamplingParams(temperature=0, max_tokens=6)
    served = llm.generate(prompt_token_ids=[prompt, prompt[:5]], sampling_params=sampling, use_tqdm=False)
    forward = jax.jit(fn)
    for prompt_ids, output in zip([prompt, prompt[:5]], served, strict=True):
        ids = list(prompt_ids)
        for token in output.outputs[0].token_ids:
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(ids)] = ids
            logits = np.asarray(forward(params, padded))[0, len(ids) - 1]
            assert logits[token] > logits.max() - 1e-4  # another token only where the two are all but equal
            ids.append(token)


@pytest.mark.slow
def test_it_runs_as_a_script(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_your_own.py", "--quick"])
    example.main()
    out = capsys.readouterr().out
    assert [prompt in out for prompt in ("Shall I compare thee", "When, in disgrace", "Let me not")] == [True] * 3


@pytest.mark.parametrize("text", ["nowhere.txt", "short.txt"])
def test_an_unusable_text_is_a_usage_error(example, monkeypatch, capsys, tmp_path, text):
    (tmp_path / "short.txt").write_text("To be")
    monkeypatch.setattr(sys, "argv", ["serve_your_own.py", "--text", str(tmp_path / text)])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert "at least 100 bytes" in capsys.readouterr().err
