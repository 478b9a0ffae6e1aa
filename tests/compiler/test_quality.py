"""How far a served model is from the one that was given: the arithmetic by hand, and models of which it is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.quality import Comparison, Windows, cut_windows
from fastgpt_jax.compiler.quality_passes import changes_by_pass, measure_quality
from fastgpt_jax.models import Llama
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.registry import PASSES, Pass
from passes.result import PassResult
from passes.splice import Splicer
from tests.artifact.built import CONFIG, LLAMA
from tests.filled_model import make_filled_model

LENGTH = 12
TEXT = cut_windows(np.random.default_rng(1).integers(0, 23, 30).tolist(), LENGTH, 1)


def log(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array([rows], np.float32))


def test_distances_are_those_of_their_definitions():
    exact = log([0.5, 0.25, 0.25], [0.25, 0.75, 0.0], [1 / 3, 1 / 3, 1 / 3])
    found = log([0.25, 0.5, 0.25], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6])
    comparison = Comparison()
    comparison.add(exact, found, Windows(np.array([[1, 2, 1]], np.int32), np.array([2], np.int32)))
    comparison.add(exact, exact, Windows(np.array([[1, 2, 1]], np.int32), np.array([0], np.int32)))  # an empty row
    first = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    second = 0.25 * np.log(0.25 / 0.4) + 0.75 * np.log(0.75 / 0.6)
    quality = comparison.result()
    assert quality.num_tokens == 2
    assert quality.mean_kld == pytest.approx((first + second) / 2)
    assert quality.kld_999 == pytest.approx(np.quantile([first, second], 0.999))
    assert quality.same_top1 == 0.5
    assert quality.perplexity == pytest.approx(1 / 0.25)


def test_what_only_the_exact_model_allows_is_infinitely_far():
    comparison = Comparison()
    windows = Windows(np.array([[0]], np.int32), np.array([1], np.int32))
    comparison.add(log([0.5, 0.5]), log([1.0, 0.0]), windows)
    assert comparison.result().mean_kld == np.inf and np.isnan(comparison.result().perplexity)


def test_a_text_is_cut_into_windows_with_the_first_token_before_each():
    windows = cut_windows([5, 6, 7, 8, 9], 3, 1)
    assert windows.tokens.tolist() == [[1, 5, 6], [1, 7, 8], [1, 9, 0]] and windows.counts.tolist() == [3, 3, 2]
    assert windows.following.tolist() == [5, 6, -1, 7, 8, -1, 9, -1]
    batches = windows.batches(2)
    assert [batch.counts.tolist() for batch in batches] == [[3, 3], [2, 0]]
    assert cut_windows([5, 6, 7], 2, None).tokens.tolist() == [[5, 6], [7, 0]]


@pytest.fixture(scope="module")
def model():
    return make_filled_model(Llama, dataclasses.replace(LLAMA, num_hidden_layers=1))


@pytest.fixture(scope="module")
def rounded(model):
    """Weights and caches in int8."""
    options = PassOptions(is_validating=False)
    config = dataclasses.replace(CONFIG, quantization="w8a16", kv_cache_dtype="int8", pass_options=options)
    return compile_model(model, config=config)


@pytest.fixture(scope="module")
def exact(rounded):
    """The same model as it is: derived once for both."""
    config = dataclasses.replace(rounded.config, quantization=None, kv_cache_dtype="auto")
    return dataclasses.replace(rounded, config=config, program=dataclasses.replace(rounded.program, row_format=None))


def test_an_exact_compile_has_the_distributions_of_the_forward(model, exact):
    (record,) = measure_quality(exact, TEXT, "text")
    assert (record.after, record.text, record.num_tokens) == ("all passes", "text", int(TEXT.counts.sum()))
    assert abs(record.mean_kld) < 1e-6 and abs(record.kld_999) < 1e-5 and record.same_top1 == 1
    logits = jax.nn.log_softmax(model(jnp.asarray(TEXT.tokens)))
    losses = [
        -logits[i, j, TEXT.tokens[i, j + 1]] for i, count in enumerate(TEXT.counts) for j in range(int(count) - 1)
    ]
    assert record.perplexity == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)


def test_each_thing_that_rounds_is_told_and_adds_to_what_came_before(rounded):
    caches, weights, *chosen = measure_quality(rounded, TEXT, "text")  # the last where native kernels are chosen
    assert all(abs(record.mean_kld - weights.mean_kld) < 0.1 * weights.mean_kld for record in chosen)
    assert (caches.after, weights.after) == ("kv_cache_dtype int8", "quantize_weights w8a16")
    assert 1e-7 < caches.mean_kld < weights.mean_kld < 0.1
    assert 0.5 < weights.same_top1 <= 1 and weights.kld_999 >= weights.mean_kld


def test_the_change_of_each_pass_is_its_own(exact, monkeypatch):
    pipeline = [
        PASSES["simplify"],
        Pass("spoil", spoil, Numerics.EXACT),
        Pass("idle", PASSES["dce"].function, Numerics.EXACT),
    ]
    monkeypatch.setattr(exact, "manager", PassManager(pipeline))
    simplified, spoiled, idle = changes_by_pass(exact)
    assert simplified.relative < 1e-5
    assert spoiled.relative > 1e-3 and spoiled.absolute > 1e-3
    assert (idle.absolute, idle.relative) == (0, 0)


def spoil(graph):
    """An error of the kind that only the whole model shows: a bias of the result."""
    (logits,) = graph.outputs
    ops, graph.outputs = Splicer().splice("spoil", lambda x: x + 0.1, [logits], logits.op.source)
    graph.ops.extend(ops)
    return PassResult(1)
