"""`fastgpt compile --check_passes --quality_text FILE`: what is measured, printed and stored, and what is refused."""

import re
from pathlib import Path

import pytest

import fastgpt_jax
from fastgpt_jax.artifact.manifest import read_manifest
from fastgpt_jax.cli import compile as tool
from fastgpt_jax.tokenizer import load_tokenizer

DEMO = Path(fastgpt_jax.__file__).parent / "assets" / "demo"
MODEL = """
import numpy as np, jax, jax.numpy as jnp

def model(p, tokens):
    x = p["embed"][tokens]
    mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, x @ p["q"] @ x.swapaxes(1, 2), -1e9))
    return (x + weights @ x @ p["v"]) @ p["embed"].T

def make_model():
    draw = np.random.default_rng(0).standard_normal
    return model, {"embed": draw((VOCAB, 64), "f4") / 8, "q": draw((64, 64), "f4") / 8, "v": draw((64, 64), "f4") / 8}
"""


def compile_small(folder, *flags):
    """A model of a user's own with the tokenizer of the demo."""
    vocab_size = load_tokenizer(DEMO).vocab_size
    (folder / "model.py").write_text(MODEL.replace("VOCAB", str(vocab_size)))
    arguments = ["--model", f"{folder}/model.py:make_model", "--output", str(folder / "out"), "--max_model_len=32"]
    return tool.main([*arguments, "--max_num_seqs=1", "--buckets=16", *flags])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"\xff\xfe", "is no UTF-8 text"), (b"", "at least 2 tokens, got 0")],
)
def test_a_text_that_is_none_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert compile_small(tmp_path, f"--tokenizer={DEMO}", "--quality_text", str(tmp_path / "text")) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err


def test_a_model_without_a_tokenizer_has_no_quality(tmp_path, capsys):
    assert compile_small(tmp_path, "--quality_text", str(tmp_path / "text")) == 2
    assert "needs a tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_changes_and_quality_are_printed_and_stored(tmp_path, capsys):
    (tmp_path / "tale.txt").write_text("Once upon a time there was a small model. It told a tale to a large one. " * 9)
    flags = ("--quantization=w8a16", "--check_passes", "--quality_text", str(tmp_path / "tale.txt"))
    assert compile_small(tmp_path, f"--tokenizer={DEMO}", *flags, "--quality_tokens=64") == 0
    out = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    quality, *_ = manifest.quality  # native kernels are chosen behind it
    assert (quality.after, quality.text) == ("quantize_weights w8a16", "tale.txt")
    assert 64 <= quality.num_tokens < 72 and 0 < quality.mean_kld < 0.1 and 0.8 < quality.same_top1 <= 1
    assert re.search(rf"^quantize_weights w8a16 +{quality.mean_kld:.6f} ", out, re.MULTILINE)
    for entry in manifest.entry_points:
        assert all(run.change is not None for run in entry.passes)
        kept = [run.change for run in entry.passes if run.numerics != "approximate"]
        (quantize,) = [run.change for run in entry.passes if run.name == "quantize_weights"]
        assert max(change.relative for change in kept) < 1e-5 < quantize.relative
    assert f"{quantize.absolute:.1e} ({quantize.relative:.1e} of the largest)" in out
