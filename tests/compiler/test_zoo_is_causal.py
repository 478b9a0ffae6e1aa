"""The zoo's models are what they claim: served ones causal at every length, refused ones not.

Runs plain forwards only; no compiler is involved.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.compiler import zoo

CAUSAL = (*zoo.SERVED, *zoo.OPTIONAL)
NOT_YET = tuple(model for model in zoo.REFUSED if model.for_now)
WRONG = tuple(model for model in zoo.REFUSED if not model.for_now)


def of(models: tuple[zoo.ZooModel, ...]) -> Any:
    """One test for each model, by name."""
    return pytest.mark.parametrize("model", models, ids=[model.name for model in models])


class Runner:
    """A model's full forward, compiled once for each length."""

    def __init__(self, model: zoo.ZooModel):
        with zoo.jax_defaults():
            fn, self.params = model.make()
        self.forward = jax.jit(zoo.full_forward(model, fn))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits f32[T, V] of tokens i32[1, T]."""
        with zoo.jax_defaults():
            return np.asarray(self.forward(self.params, tokens))[0]


def prefix_error(model: zoo.ZooModel, run: Runner) -> float:
    """How far a prefix's logits lie from those of the whole, relative to the largest.

    A model of one length has its later tokens changed instead of cut.
    """
    tokens = zoo.tokens_of(model)
    length = model.test_length
    cut = next(n for n in range(length // 2 + 1, length) if model.accepts(n) or model.only_length)
    whole = run(tokens)
    if model.only_length is None:
        prefix = run(tokens[:, :cut])
    else:
        prefix = run(np.concatenate([tokens[:, :cut], tokens[:, cut:] % 30 + 1], axis=1))[:cut]
    assert np.isfinite(whole).all() and whole.shape == (length, 31)
    return float(np.abs(prefix - whole[:cut]).max() / np.abs(whole).max())


@of(CAUSAL + NOT_YET)
def test_causal_model_gives_a_prefix_its_own_logits_and_minds_earlier_tokens(model: zoo.ZooModel):
    run = Runner(model)
    assert prefix_error(model, run) <= model.tolerance
    tokens, (position, token) = zoo.tokens_of(model), zoo.perturbation(model)
    changed = tokens.copy()
    changed[0, position] = token
    before, after = run(tokens), run(changed)
    moved = np.abs(after - before).max(axis=1) / np.abs(before).max()
    assert moved[:position].max() <= model.tolerance
    assert moved[position + 1 :].max() > 5e-3


@of(WRONG)
def test_refused_model_depends_on_what_follows(model: zoo.ZooModel):
    assert prefix_error(model, Runner(model)) > 1e-3


@of(zoo.REFUSED)
def test_refused_model_marks_its_guilty_lines(model: zoo.ZooModel):
    filename, lines = zoo.guilty_lines(model)
    assert filename.endswith("zoo/refused.py") and lines
    assert zoo.guilty_line(model) == (filename, lines[0])
    assert model.reason is not None


@of(tuple(model for model in CAUSAL if model.first_chunk > 1))
def test_prefix_model_needs_its_whole_first_chunk(model: zoo.ZooModel):
    run, tokens = Runner(model), zoo.tokens_of(model)
    whole = run(tokens)
    short = run(tokens[:, : model.first_chunk - 1])
    exact = run(tokens[:, : model.first_chunk])
    scale = np.abs(whole).max()
    assert np.abs(exact - whole[: model.first_chunk]).max() / scale <= model.tolerance
    assert np.abs(short - whole[: model.first_chunk - 1]).max() / scale > 1e-3


def test_names_are_unique():
    names = [model.name for model in (*CAUSAL, *zoo.REFUSED)]
    assert len(set(names)) == len(names)
