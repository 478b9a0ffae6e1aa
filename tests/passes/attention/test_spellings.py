"""The pass finds attention in every spelling that is drawn, and computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.attention import rewrite
from passes.attention.expression import Apply, Constant
from passes.attention.rewrite import attention
from passes.replay import evaluate
from tests.passes.attention.checking import assert_found
from tests.passes.attention.models import MODELS
from tests.passes.attention.spellings import Spelling, sample

NUM_SAMPLES, NUM_QUICK = 1000, 44


def check(spelling: Spelling, *, as_written: bool = True) -> None:
    after = assert_found(spelling.name, spelling.fn, spelling.args, spelling.num_attentions, as_written=as_written)
    assert attention(after).matched == 0, "a second run changed something"


@pytest.mark.parametrize("seed", range(NUM_QUICK))
def test_finds_a_drawn_spelling(seed):
    check(sample(seed), as_written=seed % 8 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(NUM_QUICK, NUM_SAMPLES, 96))
def test_finds_a_thousand_drawn_spellings(first):
    for seed in range(first, min(first + 96, NUM_SAMPLES)):
        check(sample(seed), as_written=seed % 3 == 0)
        if seed % 50 == 0:
            jax.clear_caches()


@pytest.mark.parametrize("name", MODELS)
def test_finds_the_attention_of_a_public_model(name):
    fn, args = MODELS[name]()
    check(Spelling(name, fn, args))


def test_a_planted_spelling_that_cannot_match_fails_the_check():
    """Weights rounded to steps are no softmax: the suite must notice that nothing was found."""
    q, k, v = np.random.RandomState(0).randn(3, 5, 4).astype(np.float32)

    def planted(q, k, v):
        return jnp.round(jax.nn.softmax(q @ k.T, axis=-1) * 16) / 16 @ v

    with pytest.raises(AssertionError, match="0 of 1 attentions found in planted"):
        check(Spelling("planted", planted, (q, k, v)))


def test_a_planted_wrong_rewrite_fails_the_check(monkeypatch):
    """Scores scaled by a part in ten thousand: the suite must notice the values."""
    found = rewrite.score_expression

    def wrong(*args):
        return Apply(lax.mul_p, (), (found(*args), Constant(1.0001, "float32")))

    monkeypatch.setattr(rewrite, "score_expression", wrong)
    with pytest.raises(AssertionError, match="error"):
        check(Spelling("gpt2", *MODELS["gpt2"]()))


def test_a_query_that_sees_no_key_attends_evenly_as_written():
    """A finite fill gives such queries equal weights; the rewrite must not make them anything else."""
    q, k, v = np.random.RandomState(0).randn(3, 5, 4).astype(np.float32)
    seen = np.tril(np.ones((5, 5), bool), -2)

    def fn(q, k, v, seen):
        return jax.nn.softmax(jnp.where(seen, q @ k.T, -1e9), axis=-1) @ v

    after = assert_found("unseeing queries", fn, (q, k, v, seen))
    np.testing.assert_allclose(evaluate(after, (q, k, v, seen))[0][:2], np.broadcast_to(v.mean(0), (2, 4)), rtol=1e-5)


def test_sinks_count_in_the_base_of_the_scores():
    q, k, v = np.random.RandomState(0).randn(3, 5, 4).astype(np.float32)

    def fn(q, k, v, sink):
        scores = q @ k.T
        top = jnp.maximum(scores.max(-1, keepdims=True), sink)
        weights = jnp.exp2(scores - top)
        return weights / (weights.sum(-1, keepdims=True) + jnp.exp2(sink - top)) @ v

    assert_found("sinks in powers of two", fn, (q, k, v, np.float32(1.5)))
