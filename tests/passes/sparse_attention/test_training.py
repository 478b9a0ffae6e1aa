"""A training forward made sparse computes less, forward and backward, where a kernel walks the blocks of its mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import passes
from fastgpt_jax.compiler.compiled_cost import compiled_cost
from fastgpt_jax.compiler.kernel_choice import target_passes
from passes.manager import PassOptions
from passes.numerics import Numerics
from passes.registry import PASSES, Pass, make_registry
from passes.select import Target
from passes.sparse_attention.parser import parse_sparsity
from passes.sparse_attention.sparse_attention import sparse_attention
from tests.passes.sparse_attention.programs import inputs, weights, written_out


@pytest.mark.slow
def test_blocks_that_the_mask_hides_are_left_out():
    sparsity = parse_sparsity("all: window(64) | sinks(4)")
    entry = Pass("sparse_attention", partial(sparse_attention, sparsity=sparsity), Numerics.LOSSY)
    registry = make_registry([*PASSES.values(), *target_passes(Target("cpu")).values(), entry])
    w, x = weights(1), inputs(1024, batch=1)

    def products(fn):
        compiled = jax.jit(fn).lower(w).compile()
        return compiled_cost(compiled).dot_flops, compiled(w)

    found = {}
    for name in ("attention,select", "attention,sparse_attention", "attention,sparse_attention,select"):
        fn = passes.apply(written_out, f"simplify,{name}", registry=registry, options=PassOptions(is_validating=False))
        run = products(lambda w, fn=fn: fn(w, x))
        found[name] = (*run, products(jax.grad(lambda w, fn=fn: jnp.sum(jnp.sin(fn(w, x)))))[0])
    causal, masked, sparse = found.values()
    np.testing.assert_allclose(sparse[1], masked[1], atol=1e-5)
    assert sparse[0] < 0.65 * causal[0] and sparse[0] < 0.4 * masked[0]
    assert sparse[2] < 0.65 * causal[2] and sparse[2] < 0.45 * masked[2]
