"""`fastgpt explain`: what it prints of a user's file, made without weights, and of what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgpt_jax.cli.demo import demo_folder
from fastgpt_jax.cli.explain import main

HEAD = """
import jax, jax.numpy as jnp, numpy as np

def layer(x, p, mask):
    scores = jnp.where(mask, jnp.einsum("btd,bsd->bts", x @ p["q"], x), -1e9)
    return x + jax.nn.softmax(scores) @ (x @ p["v"])

def causal(x):
    return jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))

def make_params(layers=()):
    keys = jax.random.split(jax.random.key(0), 3)
    p = {n: jax.random.normal(k, (*layers, 8, 8)) / 3 for n, k in zip("qv", keys)}
    return {"embed": jax.random.normal(keys[2], (20, 8)), "layers": p}
"""
PLAIN = """
def fn(p, tokens):
    x = p["embed"][tokens]
    return layer(x, p["layers"], causal(x)) @ p["embed"].T
"""
AS_NUMPY = PLAIN + "\ndef make_model(): return fn, jax.tree.map(np.asarray, make_params())"
CLOSED_OVER = """
def make_model():
    mask = jnp.tril(jnp.ones((64, 64), bool))
    def fn(p, tokens):
        x = p["embed"][tokens]
        return layer(x, p["layers"], mask[:x.shape[1], :x.shape[1]]) @ p["embed"].T
    return fn, make_params()
"""
SCANNED = """
def fn(p, tokens):
    x = p["embed"][tokens]
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p, causal(x)), None), x, p["layers"])
    return x @ p["embed"].T

def make_model(): return fn, make_params((3,))
"""
WRITTEN_OUT = """
def fn(p, tokens):
    x = p["embed"][tokens]
    for _ in range(3):
        x = layer(x, p["layers"], causal(x))
    return x @ p["embed"].T

def make_model(): return fn, make_params()
"""
BIDIRECTIONAL = """
def fn(p, tokens):
    x = p["embed"][tokens]
    return layer(x, p["layers"], True) @ p["embed"].T

def make_model(): return fn, make_params()
"""


@pytest.fixture
def explain(tmp_path, capsys):
    """Explains a file; returns the exit code and what was printed."""

    def run(text, *flags):
        (tmp_path / "model.py").write_text(HEAD + text)
        code = main([f"{tmp_path}/model.py:make_model", "--max_model_len=16", *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("text", [AS_NUMPY, CLOSED_OVER])
def test_a_function_that_asks_for_values_is_given_them(explain, text):
    code, out, err = explain(text)
    assert code == 0 and err == "" and "certified: causal" in out


def test_a_loop_over_layers_is_not_one_over_tokens(explain):
    code, out, _ = explain(SCANNED)
    assert code == 0 and "loops over tokens" not in out
    assert "kv0: 3 x float32[8], 32 bytes a token each" in out or "kv0: 3 x float32[1, 8], 32 bytes a token each" in out


def test_layers_written_out_share_a_line(explain):
    code, out, _ = explain(WRITTEN_OUT)
    assert code == 0 and out.count("bytes a token each") == 2 and "3 x float32" in out


def test_a_refused_model_is_told_nothing_else(explain):
    code, out, _ = explain(BIDIRECTIONAL)
    assert code == 1 and "is not causal" in out and "model.py:" in out
    assert "cached" not in out and "decode step" not in out


def test_a_context_longer_than_the_models_is_one_line(capsys):
    assert main([str(demo_folder()), "--max_model_len=9999"]) == 2
    assert "at most the model's own" in capsys.readouterr().err


def test_named_parameters_are_what_is_certified(explain, tmp_path):
    shapes = {"embed": (20, 8), "layers.q": (8, 8), "layers.v": (8, 8)}
    weights = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    code, out, _ = explain(AS_NUMPY, f"--params={tmp_path / 'weights.safetensors'}")
    assert code == 1 and "hold no finite number" in out
