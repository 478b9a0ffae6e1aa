"""Rounding, storing and products of quantized weights, without any graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.ops.dequantize import dequantize as dequantize_op
from passes.ops.quantized_dot import quantized_dot
from passes.quantization.packing import PACKINGS, XLA, make_packings
from passes.quantization.schemes import SCHEMES, Scheme, dequantize, quantize

FORMATS = [SCHEMES[name] for name in ("w8a16", "w4a16", "fp8")]
"""Every way of storing a weight."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "scheme, decibels",
    [
        (Scheme("", "int8"), 41.3),
        (Scheme("", "int4", group_size=128), 18.6),
        (Scheme("", "float8_e4m3fn"), 31.6),
    ],
)
def test_the_signal_to_noise_ratio_on_gaussian_weights_is_the_known_one(scheme, decibels):
    weight = normal(128, 4096)  # as long as a model's channels: the longer one is, the larger its largest weight
    error = np.asarray(dequantize(*quantize(jnp.asarray(weight), scheme), scheme)) - weight
    assert 10 * np.log10((weight**2).mean() / (error**2).mean()) == pytest.approx(decibels, abs=0.3)


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.parametrize("size", [33, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 172))])
def test_no_weight_moves_further_than_the_scheme_says(scheme, size):
    weight = normal(5, size) * np.float32(10) ** np.arange(-2, 3, dtype=np.float32)[:, None]
    qvalue, scale = quantize(jnp.asarray(weight), scheme)
    assert qvalue.shape == weight.shape and scale.shape == (5, scheme.num_groups(size))
    error = np.abs(np.asarray(dequantize(qvalue, scale, scheme)) - weight)
    group = scheme.group_size or size
    largest = np.stack([np.abs(weight[:, i : i + group]).max(1) for i in range(0, size, group)], 1)
    bound = np.repeat(largest, group, axis=1)[:, :size] * scheme.rounding_error
    # A scale that was itself rounded to bfloat16 may be too small by 2^-9, and the largest weight is then cut.
    slack = 2**-8 if scheme.scale_dtype == "bfloat16" else 1e-5
    assert (error <= bound + slack * np.repeat(largest, group, axis=1)[:, :size]).all()


def test_a_channel_of_zeros_stays_zero():
    for scheme in FORMATS:
        qvalue, scale = quantize(jnp.zeros((2, 40)), scheme)
        assert not np.asarray(dequantize(qvalue, scale, scheme)).any() and np.isfinite(np.asarray(scale, float)).all()


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@pytest.mark.parametrize("target", PACKINGS)
@pytest.mark.parametrize("size", [17, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 40))])
def test_unpack_undoes_pack_for_every_target(scheme, target, size):
    packing = PACKINGS[target]
    qvalue, _ = quantize(jnp.asarray(normal(2, 3, size)), scheme)
    packed = packing.pack(qvalue, scheme)
    again = packing.unpack(packed, scheme, size)
    assert again.dtype == qvalue.dtype and np.asarray(again).tobytes() == np.asarray(qvalue).tobytes()
    assert packed.nbytes == 2 * 3 * -(-size * scheme.bits // 8)


def test_every_nibble_survives_and_the_first_is_the_low_one():
    qvalue = jnp.asarray([[*range(-8, 8), 3]], jnp.int8)
    packed = XLA.pack(qvalue, SCHEMES["w4a16"])
    assert packed.dtype == jnp.uint8 and packed.shape == (1, 9) and int(packed[0, 0]) == 0x98
    np.testing.assert_array_equal(XLA.unpack(packed, SCHEMES["w4a16"], 17), qvalue)


def test_two_packings_of_one_target_are_refused():
    with pytest.raises(ValueError, match="two for 'xla'"):
        make_packings([XLA, XLA])


def stored(weight, scheme):
    qvalue, scale = quantize(jnp.asarray(weight), scheme)
    return XLA.pack(qvalue, scheme), scale


def rounded(x, dtype):
    if dtype is None:
        return x
    of_tokens = Scheme("", dtype)
    return np.asarray(dequantize(*quantize(jnp.asarray(x), of_tokens), of_tokens))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
@pytest.mark.parametrize(
    "num_batch, x_shape, w_shape",
    [(0, (2, 3, 70), (9, 70)), pytest.param(1, (2, 3, 40), (2, 9, 40), marks=pytest.mark.slow)],
)
def test_a_product_is_that_of_the_rounded_operands(scheme, num_batch, x_shape, w_shape):
    x, weight = normal(*x_shape, seed=1), normal(*w_shape, seed=2)
    product = lambda x, weight: quantized_dot(
        x, *stored(weight, scheme), scheme=scheme, packing=XLA, num_batch=num_batch
    )
    found = jax.jit(product)(x, weight)
    near = np.asarray(dequantize(*quantize(jnp.asarray(weight), scheme), scheme)).astype(np.float64)
    tokens = rounded(x, scheme.activation).astype(np.float64)
    want = tokens @ (near.T if num_batch == 0 else near.transpose(0, 2, 1))
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())  # float32 sums of 70 terms


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_bfloat16_activations_give_bfloat16(scheme):
    x, weight = jnp.asarray(normal(4, 64), jnp.bfloat16), normal(8, 64)
    product = lambda x, weight: quantized_dot(x, *stored(weight, scheme), scheme=scheme, packing=XLA)
    found = jax.jit(product)(x, weight)
    want = np.asarray(x, np.float32) @ weight.T
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - want).max() <= scheme.budget * np.abs(want).max()


@pytest.mark.parametrize("scheme", [SCHEMES["w8a8"], pytest.param(SCHEMES["w4a16"], marks=pytest.mark.slow)], ids=str)
def test_gradients_are_those_of_the_rounded_operands(scheme):
    x, weight = normal(5, 40, seed=1), normal(7, 40, seed=2)
    packed = stored(weight, scheme)
    ct = normal(5, 7, seed=3)

    def fn(x, weight):
        return jnp.sum(ct * quantized_dot(x, *packed, weight, scheme=scheme, packing=XLA))

    dx, dw = jax.jit(jax.grad(fn, (0, 1)))(jnp.asarray(x), jnp.asarray(weight))
    near = np.asarray(dequantize(*quantize(jnp.asarray(weight), scheme), scheme))
    np.testing.assert_allclose(dx, ct @ near, atol=1e-5)
    np.testing.assert_allclose(dw, ct.T @ rounded(x, scheme.activation), atol=1e-5)


@pytest.mark.slow
def test_an_operation_is_mapped_like_its_meaning():
    scheme = SCHEMES["w4a8"]
    x, packed = jnp.asarray(normal(3, 5, 40)), stored(normal(7, 40), scheme)
    one = lambda x: quantized_dot(x, *packed, scheme=scheme, packing=XLA)
    np.testing.assert_allclose(jax.vmap(one, in_axes=1, out_axes=1)(x), one(x), atol=1e-5)
    rows = lambda q, s: dequantize_op(q, s, scheme=scheme, packing=XLA, size=40, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.vmap(rows)(*packed), rows(*packed))


def test_scales_of_another_shape_are_refused():
    scheme = SCHEMES["w4a16"]
    qvalue, scale = stored(normal(7, 40), scheme)
    with pytest.raises(ValueError, match="needs scales of"):
        jax.eval_shape(lambda x: quantized_dot(x, qvalue, scale[:, :1], scheme=scheme, packing=XLA), jnp.ones((2, 40)))
