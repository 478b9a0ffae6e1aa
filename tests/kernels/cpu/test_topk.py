"""The largest numbers of rows on CPUs, against `jax.lax.top_k`."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.topk import top_k, top_k_refusal

pytestmark = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))


def rows(kind: str, R: int, V: int) -> np.ndarray:
    rng = np.random.default_rng(R * V)
    if kind == "normal":
        return rng.standard_normal((R, V)).astype(np.float32)
    if kind == "many equal":
        return rng.integers(-3, 3, (R, V)).astype(np.float32)
    if kind == "rising":
        return np.broadcast_to(np.arange(V, dtype=np.float32), (R, V)).copy()
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0, 1e-42], np.float32)
    return rng.choice(special, (R, V))


@pytest.mark.parametrize("kind", ["normal", "many equal", "rising", "special"])
@pytest.mark.parametrize(("R", "V", "k"), [(1, 70001, 5), (3, 1000, 64), (2, 65, 65), (1, 1, 1), (1, 40000, 20000)])
def test_it_is_top_k(kind, R, V, k):
    x = jnp.asarray(rows(kind, R, V))
    values, indices = jax.jit(top_k, static_argnums=1)(x, k)
    want_values, want_indices = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(np.asarray(values).view(np.int32), np.asarray(want_values).view(np.int32))
    np.testing.assert_array_equal(indices, want_indices)


def test_leading_axes_stay():
    values, indices = top_k(jnp.asarray(rows("normal", 6, 50)).reshape(2, 3, 50), 4)
    assert values.shape == indices.shape == (2, 3, 4)
    assert [x.shape for x in top_k(jnp.zeros((0, 9)), 2)] == [(0, 2), (0, 2)]


def test_what_it_does_not_take_is_told():
    assert "got bfloat16" in str(top_k_refusal(jnp.zeros((2, 9), jnp.bfloat16)))
    with pytest.raises(NotImplementedError, match="compares float32, got bfloat16"):
        jax.eval_shape(lambda x: top_k(x, 1), jnp.zeros((2, 9), jnp.bfloat16))
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"between 1 and all 9 numbers of a row, got k={k}"):
            top_k(jnp.zeros((2, 9)), k)
    call = jax.ffi.ffi_call("fastgpt_topk", [jax.ShapeDtypeStruct((2, 10), x) for x in (jnp.float32, jnp.int32)])
    with pytest.raises(Exception, match="fastgpt_topk: k must be at least 1 and at most V"):
        jax.block_until_ready(call(jnp.zeros((2, 9))))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instructions_find_the_same(isa):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        f"{__file__}::test_it_is_top_k",
    ]
    environment = os.environ | {"FASTGPT_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "20 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
