"""Gradients of a training step of the demo model through `passes.apply`: those of the model as it is written."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fastgpt_jax
import passes
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.training.loop import next_token_loss
from passes import compat
from passes.manager import PassOptions
from passes.numerics import Numerics
from passes.quantization.quantize_weights import quantize_weights
from passes.quantization.rules import default_rules
from passes.quantization.schemes import SCHEMES
from passes.registry import PASSES, Pass

DEMO = Path(fastgpt_jax.__file__).parent / "assets" / "demo"
UNVALIDATED = PassOptions(is_validating=False)  # what passes make is validated where they are tested
KEEPING = [name for name, entry in PASSES.items() if entry.numerics is not Numerics.APPROXIMATE]
BEFORE = {"residual_norm": "simplify,rms_norm,"}
"""What a pass builds on."""


@pytest.fixture(scope="module")
def demo():
    """The forward as a function, its parameters in float32, windows of text, and the gradients of the loss."""
    loaded = load_model(DEMO, dtype="float32")
    graphdef, params = nnx.split(loaded.model)
    ids = loaded.tokenizer.encode("Once upon a time there was a small model that told a tale to a large one.")[:18]
    windows = jnp.asarray([ids[:13], ids[5:18]], jnp.int32)
    forward = lambda params, tokens: nnx.merge(graphdef, params)(tokens)
    loss = functools.partial(next_token_loss, forward)
    return loss, params, windows, compat.quick_jit(jax.value_and_grad(loss))(params, windows)


@pytest.mark.parametrize("name", ["fuse", *[pytest.param(name, marks=pytest.mark.slow) for name in KEEPING]])
def test_passes_that_keep_results_keep_gradients(demo, name):
    loss, params, windows, wanted = demo
    rewritten = passes.apply(loss, BEFORE.get(name, "simplify,") + name, options=UNVALIDATED)
    found = compat.quick_jit(jax.value_and_grad(rewritten))(params, windows)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_through_quantization_are_finite_and_point_the_same_way(demo, scheme):
    loss, params, windows, (_, wanted) = demo
    quantize = lambda graph: quantize_weights(graph, default_rules(SCHEMES[scheme]), is_trainable=True)
    registry = {**PASSES, "quantize": Pass("quantize", quantize, Numerics.APPROXIMATE)}
    rounded = passes.apply(loss, "simplify,quantize,simplify", registry=registry, options=UNVALIDATED)
    _, found = compat.quick_jit(jax.value_and_grad(rounded))(params, windows)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert np.isfinite(b).all() and np.any(np.asarray(b))
        assert np.vdot(a, b) > 0.5 * np.linalg.norm(a) * np.linalg.norm(b)
    different = [not np.allclose(a, b, rtol=1e-4) for a, b in zip(*map(jax.tree.leaves, (wanted, found)), strict=True)]
    assert any(different), "nothing was rounded"
