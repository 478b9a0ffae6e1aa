"""The zoo's models are what they claim: served ones causal at every length, refused ones not.

Runs plain forwards only; no compiler is involved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jax import Array

from tests.compiler import zoo

CAUSAL = (*zoo.SERVED, *zoo.OPTIONAL)
NOT_YET = tuple(model for model in zoo.REFUSED if model.for_now)
WRONG = tuple(model for model in zoo.REFUSED if not model.for_now)


def of(models: tuple[zoo.ZooModel, ...]) -> Any:
    """One test for each model, by name."""
    return pytest.mark.parametrize("model", models, ids=[model.name for model in models])


class Runner:
    """A model's full forward over all test tokens and over a prefix of them, compiled together.

    A model of one length has no prefix.
    """

    def __init__(self, model: zoo.ZooModel):
        with zoo.jax_defaults():
            fn, self.params = model.make()
        self.tokens, length = zoo.tokens_of(model), model.test_length
        self.cut = next((n for n in range(length // 2 + 1, length) if model.accepts(n)), length)
        forward = zoo.full_forward(model, fn)

        def both(params: Any, tokens: Array) -> tuple[Array, Array]:
            whole = forward(params, tokens)
            return whole, whole if self.cut == length else forward(params, tokens[:, : self.cut])

        self.both = zoo.quick_jit(both)

    def __call__(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[T, V] of tokens i32[1, T], and f32[cut, V] of their prefix."""
        with zoo.jax_defaults():
            whole, prefix = self.both(self.params, tokens)
        return np.asarray(whole)[0], np.asarray(prefix)[0]

    def dependence_on_what_follows(self) -> float:
        """How far a prefix's logits move when what follows is cut off or changed, relative to the largest.

        The change begins where no block of 4 or 8 ends: a model that demands whole blocks may look ahead within them,
        and no prefix that it accepts shows that.
        """
        whole, prefix = self(self.tokens)
        assert np.isfinite(whole).all() and whole.shape == (self.tokens.shape[1], 31)
        kept = self.tokens.shape[1] // 2 + 1
        changed = self.tokens.copy()
        changed[:, kept:] = changed[:, kept:] % 30 + 1
        moved = np.abs(prefix - whole[: self.cut]).max(), np.abs(self(changed)[0][:kept] - whole[:kept]).max()
        return float(max(moved) / np.abs(whole).max())


@of(CAUSAL + NOT_YET)
def test_causal_model_ignores_what_follows_and_minds_earlier_tokens(model: zoo.ZooModel):
    run = Runner(model)
    assert run.dependence_on_what_follows() <= model.tolerance
    position, token = zoo.perturbation(model)
    changed = run.tokens.copy()
    changed[0, position] = token
    before, after = run(run.tokens)[0], run(changed)[0]
    moved = np.abs(after - before).max(axis=1) / np.abs(before).max()
    assert moved[:position].max() <= model.tolerance
    assert moved[position + 1 :].max() > 5e-3


@of(WRONG)
def test_refused_model_depends_on_what_follows(model: zoo.ZooModel):
    assert Runner(model).dependence_on_what_follows() > 1e-3


@of(zoo.REFUSED)
def test_refused_model_marks_its_guilty_lines(model: zoo.ZooModel):
    filename, lines = zoo.guilty_lines(model)
    assert filename.endswith("zoo/refused.py") and lines
    assert zoo.guilty_line(model) == (filename, lines[0])
    assert model.reason is not None


@of(tuple(model for model in CAUSAL if model.first_chunk > 1))
def test_prefix_model_needs_its_whole_first_chunk(model: zoo.ZooModel):
    with zoo.jax_defaults():
        fn, params = model.make()
    run, tokens, first = zoo.quick_jit(zoo.full_forward(model, fn)), zoo.tokens_of(model), model.first_chunk
    whole, exact, short = (np.asarray(run(params, tokens[:, :n]))[0] for n in (model.test_length, first, first - 1))
    scale = np.abs(whole).max()
    assert np.abs(exact - whole[:first]).max() / scale <= model.tolerance
    assert np.abs(short - whole[: first - 1]).max() / scale > 1e-3


def test_names_are_unique():
    names = [model.name for model in (*CAUSAL, *zoo.REFUSED)]
    assert len(set(names)) == len(names)
