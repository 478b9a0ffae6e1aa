"""The dot kernels against references in float64 and integers: one suite over named shapes, for every variant."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastgpt_jax.kernels.cpu import dot, library
from passes.quantization import packing, schemes

pytestmark = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))
BF16 = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    T: int
    K: int
    O: int  # noqa: E741  As the kernels name it.


SHAPES = {
    "one_of_each": Shape(1, 1, 1),
    "one_row": Shape(1, 128, 1),
    "decode": Shape(1, 256, 48),
    "stories260k": Shape(3, 172, 64),
    "odd_depth": Shape(5, 333, 19),
    "odd_rows": Shape(7, 64, 33),
    "short_last_group": Shape(2, 160 + 9, 20),
    "two_tiles": Shape(8, 512, 36),
    "skinny": Shape(32, 320, 40),
    "parts_of_depth": Shape(19, 6500, 10),
    "many_tokens": Shape(530, 96, 21),
    "many_rows": Shape(2, 64, 1030),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: what the kernel gets and what is right."""

    run: object
    wanted: np.ndarray
    scale: np.ndarray  # The size of the sums' terms: rounding errors are a share of it.


def numbers(shape: Shape, dtype, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((shape.T, shape.K)).astype(dtype)
    return x, random.standard_normal((shape.O, shape.K)).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """What tokens become: in float64, but for what float32 decides."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.rint(x * (np.float32(1) / scale)).astype(np.float64) * scale


def weights_case(shape: Shape, x_dtype, w_dtype) -> Case:
    x, w = numbers(shape, x_dtype)
    w = w.astype(w_dtype)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    return Case(lambda: dot.weight_dot(x, w, out_dtype=jnp.float32), x64 @ w64.T, np.abs(x64) @ np.abs(w64).T)


def quantized(w: np.ndarray, largest: int, group_size: int, scale_dtype) -> tuple[np.ndarray, np.ndarray]:
    """Small numbers `[O, K]`, one of them the smallest there is, which our rounding never makes; scales `[O, C]`."""
    padded = np.pad(w, [(0, 0), (0, -w.shape[1] % group_size)]).reshape(len(w), -1, group_size)
    scale = (np.abs(padded).max(-1) / largest + 1e-3).astype(scale_dtype)
    number = np.rint(padded / scale.astype(np.float32)[..., None]).clip(-largest, largest).astype(np.int8)
    number = number.reshape(len(w), -1)[:, : w.shape[1]].copy()
    number.flat[0] = -largest - 1
    return number, scale


def int8_case(shape: Shape, x_dtype, activation: str | None) -> Case:
    x, w = numbers(shape, x_dtype)
    qvalue, scale = quantized(w, 127, shape.K, np.float32)
    x64 = rounded(x) if activation else x.astype(np.float64)
    w64 = qvalue.astype(np.float64) * scale
    run = lambda: dot.int8_dot(x, qvalue, scale, activation=activation, out_dtype=jnp.float32)
    return Case(run, x64 @ w64.T, np.abs(x64) @ np.abs(w64).T)


def int4_case(shape: Shape, x_dtype, activation: str | None, group_size: int) -> Case:
    x, w = numbers(shape, x_dtype)
    qvalue, scale = quantized(w, 7, group_size, BF16)
    nibbles = np.pad(qvalue, [(0, 0), (0, shape.K % 2)]).astype(np.uint8) & 15
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    x64 = rounded(x) if activation else x.astype(np.float64)
    each = np.repeat(scale.astype(np.float64), group_size, -1)[:, : shape.K]
    w64 = qvalue.astype(np.float64) * each
    run = lambda: dot.int4_dot(x, packed, scale, group_size=group_size, activation=activation, out_dtype=jnp.float32)
    return Case(run, x64 @ w64.T, np.abs(x64) @ np.abs(w64).T)


def test_nibbles_lie_as_the_portable_program_packs_them():
    x, w = numbers(SHAPES["odd_depth"], np.float32)
    scheme = schemes.SCHEMES["w4a16"]
    qvalue, scale = schemes.quantize(w, scheme)
    got = dot.int4_dot(x, packing.XLA.pack(qvalue, scheme), scale, group_size=32, activation=None)
    wanted = x @ np.asarray(schemes.dequantize(qvalue, scale, scheme)).T
    np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-3)


CASES = {
    "f32_f32": lambda shape: weights_case(shape, np.float32, np.float32),
    "f32_bf16": lambda shape: weights_case(shape, np.float32, BF16),
    "bf16_f32": lambda shape: weights_case(shape, BF16, np.float32),
    "bf16_bf16": lambda shape: weights_case(shape, BF16, BF16),
    "int8_f32": lambda shape: int8_case(shape, np.float32, None),
    "int8_bf16": lambda shape: int8_case(shape, BF16, None),
    "int8_rounded_f32": lambda shape: int8_case(shape, np.float32, "int8"),
    "int8_rounded_bf16": lambda shape: int8_case(shape, BF16, "int8"),
    "int4_f32": lambda shape: int4_case(shape, np.float32, None, 32),
    "int4_bf16_g64": lambda shape: int4_case(shape, BF16, None, 64),
    "int4_rounded_f32": lambda shape: int4_case(shape, np.float32, "int8", 32),
    "int4_rounded_bf16_g96": lambda shape: int4_case(shape, BF16, "int8", 96),
    "int4_rounded_f32_g128": lambda shape: int4_case(shape, np.float32, "int8", 128),
}


def error_of(case: Case, got: np.ndarray) -> float:
    """The largest error as a share of the terms' size."""
    return float((np.abs(np.asarray(got, np.float64) - case.wanted) / (case.scale + 1e-30)).max())


# Sums of float32 in many chains: an error of a few roundings of 2^-24, not of their number.
BUDGET = 2e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_products_are_those_of_float64(make, shape):
    library.register()
    case = make(shape)
    got = case.run()
    assert got.shape == (shape.T, shape.O) and got.dtype == jnp.float32
    assert error_of(case, got) < BUDGET


def test_the_suite_sees_one_weight_that_is_wrong():
    case = weights_case(SHAPES["parts_of_depth"], np.float32, np.float32)
    x, w = numbers(SHAPES["parts_of_depth"], np.float32)
    w[3, -1] += 0.1
    assert error_of(case, dot.weight_dot(x, w)) > BUDGET


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
def test_sums_of_integers_are_those_of_the_portable_program(dtype):
    x, w = numbers(Shape(40, 1000, 24), dtype, seed=1)
    x[3] = 0
    qvalue, _ = schemes.quantize(w, schemes.SCHEMES["w8a8"])
    one = jnp.ones((24, 1))

    @jax.jit
    def portable(x):
        tokens, scale = schemes.quantize_tokens(x, "int8")
        total = jax.lax.dot_general(tokens, qvalue, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return total.astype(jnp.float32) * scale

    got = dot.int8_dot(x, qvalue, one, activation="int8", out_dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(portable(x)))


@pytest.mark.parametrize("make", [CASES["f32_bf16"], CASES["int8_rounded_f32"]], ids=["bf16", "int8"])
def test_results_may_be_bfloat16_and_have_leading_axes(make):
    shape = SHAPES["stories260k"]
    x, w = numbers(Shape(6, shape.K, shape.O), np.float32)
    w = w.astype(BF16)
    whole = dot.weight_dot(x, w)
    got = jax.jit(lambda x, w: dot.weight_dot(x, w, out_dtype=jnp.bfloat16))(x.reshape(2, 3, -1), w)
    assert got.shape == (2, 3, shape.O) and got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got).reshape(6, -1), np.asarray(whole.astype(jnp.bfloat16)))


def test_no_tokens_give_no_results():
    assert dot.weight_dot(np.zeros((0, 8), np.float32), np.zeros((4, 8), np.float32)).shape == (0, 4)


def test_what_the_kernels_cannot_take_is_declined_with_a_reason():
    x, w = np.zeros((2, 64), np.float32), np.zeros((8, 64), np.int8)
    packed, scale = np.zeros((8, 32), np.uint8), np.zeros((8, 2), BF16)
    assert "float32 or bfloat16" in dot.weight_dot_refusal(64, 8, np.float16, np.float32)
    assert "got int8" in dot.weight_dot_refusal(64, 8, np.float32, np.int8)
    assert "for each of 8 rows" in dot.int8_dot_refusal(x, w, np.zeros(7, np.float32), activation=None)
    assert "got 'int4'" in dot.int8_dot_refusal(x, w, np.zeros(8, np.float32), activation="int4")
    deep = jax.ShapeDtypeStruct((1, 200_000), np.float32), jax.ShapeDtypeStruct((8, 200_000), np.int8)
    assert "int32" in dot.int8_dot_refusal(*deep, np.zeros(8, np.float32), activation="int8")
    assert "multiple of 32" in dot.int4_dot_refusal(x, packed, scale, group_size=48, activation=None)
    assert "(8, 1)" in dot.int4_dot_refusal(x, packed, scale, group_size=64, activation=None)
    assert dot.int4_dot_refusal(x, packed, scale, group_size=32, activation="int8") is None
    with pytest.raises(NotImplementedError, match=r"\[O, 64\]"):
        dot.weight_dot(x, np.zeros((8, 63), np.float32))
    with pytest.raises(NotImplementedError, match="float16"):
        dot.int8_dot(x, w, np.zeros(8, np.float32), activation=None, out_dtype=np.float16)
    with pytest.raises(NotImplementedError, match="multiple of 32"):
        dot.int4_dot(x, packed, scale, group_size=48, activation=None)


@pytest.mark.parametrize(
    "op, operands, attributes, said",
    [
        ("weight_dot", [(2, 64), (8, 63)], {}, r"\[..., 63\] is needed, got \[2, 64\]"),
        ("int8_dot", [(2, 64), (8, 64), (8,)], {"is_activation_rounded": np.bool_(True)}, "weights must be int8"),
        (
            "int4_dot",
            [(2, 64), (8, 64), (8, 2)],
            {"is_activation_rounded": np.bool_(True), "group_size": np.int64(32)},
            "uint8 .O, 32.",
        ),
    ],
)
def test_wrong_calls_are_refused_by_the_library_itself(op, operands, attributes, said):
    library.register()
    call = jax.ffi.ffi_call(f"fastgpt_{op}", jax.ShapeDtypeStruct((2, 8), np.float32))
    with pytest.raises(Exception, match=f"fastgpt_{op}: .*{said}"):
        jax.block_until_ready(call(*[np.zeros(shape, np.float32) for shape in operands], **attributes))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512_vnni"])
def test_other_variants_hold_the_same_contract(isa):
    known = ("portable", "avx2", "avx512_vnni", "avx512_bf16")
    if library.isa() not in known or known.index(isa) >= known.index(library.isa()):
        pytest.skip(f"this processor has {library.isa()}, which the suite itself runs")
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "test_products or integers"
    command = [sys.executable, "-c", code, "-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, __file__]
    environment = os.environ | {"FASTGPT_CPU_ISA": isa, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
