"""Random inputs for the named shapes, and what float64 makes of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.kernels.attention import reference
from fastgpt_jax.kernels.attention.shapes import SHAPES, TABLE_BLOCK, NamedShape
from passes.masks import key_rule


class Inputs(NamedTuple):
    query: Any
    key: Any
    value: Any
    leaves: Sequence[Any]
    sinks: Any


def drawn(name: str) -> np.random.Generator:
    """A generator of its own for each array: inputs that resemble each other hide mistakes."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def make_inputs(shape: NamedShape, *, garbage: bool = True) -> Inputs:
    """Inputs as NumPy arrays; where the mask rules keys out by themselves, their rows are NaN."""
    s = shape
    query = drawn("query").standard_normal((s.B, s.T, s.N, s.H))
    key = drawn("key").standard_normal((s.B, s.S, s.K, s.H))
    value = drawn("value").standard_normal((s.B, s.S, s.K, s.E))
    longest = max(s.S, s.T)
    table = (-(-s.T // TABLE_BLOCK[0]), -(-s.S // TABLE_BLOCK[1]))
    ancestors = drawn("ancestors").integers(-(2**31), 2**31, (s.B, s.T, 2))
    leaves = [
        drawn("lengths").integers(s.length, s.S + 1, s.B).astype(np.int32),
        drawn("query segments").integers(0, 3, (s.B, s.T)).astype(np.int32),
        np.sort(drawn("key segments").integers(0, 4, (s.B, longest))).astype(np.int32),
        drawn("flags").integers(0, 2, (1, s.S)).astype(bool),  # the same for all requests
        drawn("table").integers(0, 2, (s.B, *table)).astype(bool),
        ancestors.astype(np.int32),
        drawn("slopes").uniform(0, 0.3, (1, s.N)).astype(np.float32),
        drawn("starts").integers(0, max(1, s.S - s.T), s.B).astype(np.int32),
    ]
    if garbage:
        for b in range(s.B):
            own = [leaf[b if len(leaf) > 1 else 0] for leaf in leaves]
            live = key_rule(s.mask).contains(np.zeros((), int), np.arange(s.S), own)
            key[b, ~live], value[b, ~live] = np.nan, np.nan
    sinks = drawn("sinks").standard_normal(s.N).astype(np.float32) if s.has_sinks else None
    arrays = (np.asarray(jnp.asarray(x, s.dtype)) for x in (query, key, value))
    return Inputs(*arrays, leaves, sinks)


@functools.cache
def float64_result(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The reference on the same inputs, widened."""
    shape = SHAPES[name]
    inputs = make_inputs(shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(x, np.float64 if jnp.issubdtype(x.dtype, np.inexact) else None), inputs
        )
        out, lse = jax.jit(functools.partial(reference.attend, shape.spec))(*wide)
        return np.asarray(out), np.asarray(lse)


def assert_close(name: str, result: tuple[Any, Any]) -> None:
    """Holds a result against float64."""
    out, lse = (np.asarray(x, np.float64) for x in result)
    want_out, want_lse = float64_result(name)
    # float32: sums of some hundred products of size 1. bfloat16: weights are rounded to 8 bits, and so is the result,
    # of size 4 at most; products of bfloat16 are exact in float32, so that lse is as good as ever.
    atol = 5e-6 if SHAPES[name].dtype == "float32" else 2**-7
    np.testing.assert_allclose(out, want_out, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=5e-6)
