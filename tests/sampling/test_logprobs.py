"""Log-probabilities, ranks and tops against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.sampling.logprobs import score
from tests.sampling.reference import softmax

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_equal_the_reference(dtype):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(6, 30)) * 3, dtype)
    targets = np.array([0, 29, 5, 5, 1000, -4], np.int32)
    found = jax.jit(score, static_argnums=2)(logits, targets, 4)
    exact = np.log([softmax(row) for row in np.asarray(logits, np.float64)])
    clamped = np.clip(targets, 0, 29)
    chosen = exact[np.arange(6), clamped]
    np.testing.assert_allclose(found.logprobs, chosen, atol=1e-5)  # float32 sums of 30 terms
    np.testing.assert_array_equal(found.ranks, 1 + np.sum(exact > chosen[:, None] + 1e-12, axis=1))
    order = np.argsort(-exact, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(exact, order, axis=1), atol=1e-5)


def test_tops_are_no_wider_than_asked_or_than_the_vocabulary():
    logits, targets = jnp.zeros((2, 3), jnp.float32), jnp.zeros((2,), jnp.int32)
    assert score(logits, targets, 20).top_ids.shape == (2, 3)
    assert score(logits, targets, 0).top_ids.shape == (2, 0)
