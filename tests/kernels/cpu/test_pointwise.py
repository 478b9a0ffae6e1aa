"""Native norms, gates and rotations against the meaning of the operations they stand for, computed in float64."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.kernels.cpu import library, pointwise
from passes import compat
from passes.ops.gated import gated_p
from passes.ops.norms import layer_norm_p, rms_norm_p
from passes.ops.rope import rope_p

pytestmark = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))

TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-8}
SHAPES = [(1, 1), (3, 7), (2, 3, 48), (70, 260)]


def draw(name: str, shape, dtype="float32", scale=1.0):
    generator = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))
    return jnp.asarray(generator.standard_normal(shape) * scale, dtype)


def wide(primitive, *operands, **params):
    """The meaning in float64, on the operands as they were rounded."""
    with jax.enable_x64(True):
        made = compat.meaning_of(primitive)(*(jnp.asarray(x, jnp.float64) for x in operands), **params)
        return jax.tree.map(np.asarray, made)


def assert_close(have, want, dtype):
    have, size = np.asarray(have, np.float64), max(1e-30, float(np.sqrt(np.mean(np.square(want)))))
    np.testing.assert_allclose(have / size, want / size, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_with_and_without_weight(shape, dtype):
    x, weight = draw("x", shape, dtype, 3.0), draw("w", shape[-1:])
    for given in ([x], [x, weight]):
        want = wide(rms_norm_p, *given, eps=1e-5, outer_eps=0.0, dtype=jnp.float64)
        (have,) = jax.jit(lambda *v: pointwise.norm(v[0], None, *v[1:], eps=1e-5, has_mean=False, dtype=dtype))(*given)
        assert have.dtype == dtype
        assert_close(have, want, dtype)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1])
def test_layer_norm_takes_the_mean_off_first(shape):
    x, weight, bias = draw("x", shape) + 100.0, draw("w", shape[-1:]), draw("b", shape[-1:])
    how = {"eps": 1e-5, "outer_eps": 1e-3}
    want = wide(layer_norm_p, x, weight, bias, dtype=jnp.float64, has_weight=True, has_bias=True, **how)
    (have,) = jax.jit(lambda *v: pointwise.norm(v[0], None, *v[1:], has_mean=True, dtype="float32", **how))(
        x, weight, bias
    )
    np.testing.assert_allclose(np.asarray(have), want, rtol=0, atol=2e-4)  # 100 in float32 is rounded by 4e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_rounded_before_its_norm_is_taken(shape, dtype):
    x, y, weight = draw("x", shape, dtype), draw("y", shape, dtype), draw("w", shape[-1:], dtype)
    have = jax.jit(lambda x, y, w: pointwise.norm(x, y, w, eps=1e-6, has_mean=False, dtype=dtype))(x, y, weight)
    np.testing.assert_array_equal(np.asarray(have[1]), np.asarray(x + y))
    want = wide(rms_norm_p, x + y, weight, eps=1e-6, outer_eps=0.0, dtype=jnp.float64)
    assert_close(have[0], want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", pointwise.ACTIVATIONS)
def test_gates_over_all_sizes_of_numbers(activation, dtype):
    gate = jnp.asarray(np.concatenate([np.linspace(-30, 30, 4001), [-100, -89, 88, 100, 0.0, -1e-6, 1e-6]]), dtype)
    up = draw("up", gate.shape, dtype)
    how = {"activation": activation, "spelling": 0}
    want = wide(gated_p, gate, up, inner_dtype=jnp.float64, dtype=jnp.float64, **how)
    have = jax.jit(lambda g, u: pointwise.gated(g, u, activation=activation, dtype=dtype))(gate, up)
    assert_close(have, want, dtype)


def test_gates_keep_what_is_no_number():
    gate = jnp.asarray([np.nan, np.inf, 1.0, -np.inf] + [0.5] * 20, jnp.float32)
    have = np.asarray(pointwise.gated(gate, jnp.ones_like(gate), activation="silu", dtype="float32"))
    assert np.isnan(have[0]) and have[1] == np.inf and abs(have[2] - 0.7310586) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("lead, table_lead", [((3, 4), (3, 1)), ((1, 5), (1, 1)), ((2, 3, 4), (2, 1, 4)), ((7,), (7,))])
def test_rotations_find_their_angles(lead, table_lead, is_interleaved, dtype):
    for H, width in ((2, 1), (40, 20), (72, 72)):
        x = draw("x", (*lead, H), dtype)
        angle = np.random.default_rng(H).uniform(-9, 9, (*table_lead, width))
        cos, sin = jnp.asarray(np.cos(angle), "float32"), jnp.asarray(np.sin(angle), "float32")
        want = wide(rope_p, x, cos, sin, is_interleaved=is_interleaved, dtype=jnp.float64)
        have = jax.jit(lambda *v: pointwise.rope(*v, is_interleaved=is_interleaved, dtype=dtype))(x, cos, sin)
        assert_close(have, want, dtype)


def test_wrong_calls_are_refused():
    x = jnp.ones((2, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="as many numbers as a row"):
        pointwise.norm(x, None, jnp.ones(7), eps=1e-5, has_mean=False, dtype="float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32 or bfloat16"):
        pointwise.gated(x.astype("float16"), x, activation="silu", dtype="float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="activation must be"):
        pointwise.gated(x, x, activation="swish", dtype="float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match="other axes as in x"):
        pointwise.rope(x, jnp.ones((3, 4)), jnp.ones((3, 4)), is_interleaved=False, dtype="float32")
