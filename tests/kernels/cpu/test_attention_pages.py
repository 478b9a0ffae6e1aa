"""Attention over pages on CPUs against float64: odd lengths, pages and layers, garbage where it may be."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.kernels.attention.spec import AttentionSpec
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.attention import paged_attention, paged_attention_refusal
from passes.masks import KeyLength, KeyRange, Mask, Offset, Shifted, Tree, causal, window
from tests.kernels.cpu.paged_inputs import ALIBI, Step, float64_step, make_step, written_pools

pytestmark = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))

_DRAFT = KeyLength(0) | Tree(2, 0)

STEPS = {
    "decode": Step((5, 0, 17, 130), page_size=8),
    "decode, padding, layers": Step((9, None, 70, 31), page_size=16, N=8, K=1, layers=(1, 2), has_sinks=True),
    "decode, seven heads a KV head": Step((63, 64, 65), N=14, K=2, H=64, E=64, page_size=16),
    "decode, one head a KV head": Step((63, 3, 40), N=3, K=3, H=24, E=40, page_size=24),
    "decode, two heads a KV head": Step((100, 3), N=4, K=2, H=128, E=128, page_size=64),
    "decode, many heads a KV head": Step((100, 3), N=40, K=2, H=32, E=64, page_size=8),
    "decode, long": Step((2900, 700), N=8, K=1, H=64, E=64, page_size=32, has_sinks=True),
    "decode, long, window and sinks": Step(
        (5000, 700), mask=Shifted(causal() & (window(99) | KeyRange(0, 5)), 0), N=4, page_size=8
    ),
    "prefill": Step((0, 40), T=67, N=8, K=2, H=64, E=64, page_size=16),
    "prefill, window": Step((0, 40, None), T=33, mask=Shifted(window(20), 0), page_size=8, N=4, K=2),
    "prefill, long": Step((900,), T=50, N=4, K=2, page_size=16),
    "tokens of a prompt as requests": Step(
        (*range(7, 44), 90, 3, None, None), owners=(*[0] * 37, 1, 2, 3, 4), N=8, K=2, H=64, E=64, page_size=16
    ),
    "shared pages": Step((50, 61, 40), T=2, num_shared_pages=4, page_size=8),
    "draft": Step((20, 50), T=6, mask=_DRAFT, page_size=8),
    "soft-cap and ALiBi": Step((20, 77), T=3, soft_cap=9.0, score=ALIBI, page_size=8),
    "bfloat16": Step((20, 77), N=8, K=1, H=64, E=64, dtype="bfloat16", page_size=16),
    "bfloat16, three heads a KV head": Step((20, 300), N=6, K=2, H=34, E=96, dtype="bfloat16", page_size=16),
    "bfloat16 pools": Step((20, 77), T=5, N=8, K=2, H=24, E=40, pool="bfloat16", page_size=16),
    "int8 pools": Step((20, 77), N=8, K=2, H=64, E=64, pool="int8", page_size=16),
    "int8 pools, prefill": Step((20, 7), T=30, pool="int8", page_size=16, layers=(0,)),
}


def run(step: Step, inputs, spec: AttentionSpec | None = None):
    def call(query, rows_k, rows_v, positions, pages, pool_k, pool_v, layers, leaves, sinks, scales):
        return paged_attention(
            spec or step.spec,
            *(query, rows_k, rows_v, positions, pages, pool_k, pool_v, layers),
            num_keys=inputs.num_keys,
            leaves=leaves,
            sinks=sinks,
            scales=scales,
        )

    arrays = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    del arrays["num_keys"]
    return jax.jit(call, donate_argnames=("pool_k", "pool_v"))(**jax.tree.map(jnp.asarray, arrays))


def assert_step(step: Step, inputs, out) -> None:
    # float32: sums of some hundred products of size 1. bfloat16: the result is rounded to 8 bits.
    atol = 5e-6 if step.dtype == "float32" else 2**-7
    np.testing.assert_allclose(np.asarray(out, np.float64), float64_step(step, inputs), rtol=0, atol=atol)


@pytest.mark.parametrize("name", STEPS)
def test_steps_write_and_attend(name):
    step, inputs = STEPS[name], make_step(STEPS[name])
    out, *pools = run(step, inputs)
    assert out.dtype == step.dtype
    assert_step(step, inputs, out)
    for pool, want in zip(pools, written_pools(step, inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("name", ["decode, long", "prefill", "tokens of a prompt as requests"])
@pytest.mark.parametrize("planted", [Offset(1, None), Offset(-1, None)])
def test_the_suite_catches_masks_that_are_off_by_one(name, planted: Mask):
    step = STEPS[name]
    inputs = make_step(step)
    spec = dataclasses.replace(step.spec, mask=Shifted(planted, 0))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_step(step, inputs, run(step, inputs, spec)[0])


def test_donated_pools_are_updated_in_place():
    step = STEPS["decode"]
    i = jax.tree.map(jnp.asarray, make_step(step).__dict__ | {"num_keys": 0})

    def call(pool_k, pool_v):
        return paged_attention(
            step.spec, i["query"], i["rows_k"], i["rows_v"], i["positions"], i["pages"], pool_k, pool_v,
            num_keys=100, leaves=i["leaves"],
        )  # fmt: skip

    compiled = jax.jit(call, donate_argnums=(0, 1)).lower(i["pool_k"], i["pool_v"]).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < i["pool_k"].nbytes
    where = [i["pool_k"].unsafe_buffer_pointer(), i["pool_v"].unsafe_buffer_pointer()]
    _, *pools = compiled(i["pool_k"], i["pool_v"])
    assert [pool.unsafe_buffer_pointer() for pool in pools] == where


def test_pools_that_are_kept_stay_as_they_were():
    step = STEPS["decode"]
    inputs = make_step(step)
    kept = [jnp.asarray(inputs.pool_k), jnp.asarray(inputs.pool_v)]
    query, rows_k, rows_v, positions, pages, leaves = jax.tree.map(
        jnp.asarray, (inputs.query, inputs.rows_k, inputs.rows_v, inputs.positions, inputs.pages, inputs.leaves)
    )
    paged_attention(step.spec, query, rows_k, rows_v, positions, pages, kept[0], kept[1], num_keys=9, leaves=leaves)
    np.testing.assert_array_equal(kept[0], inputs.pool_k)
    np.testing.assert_array_equal(kept[1], inputs.pool_v)


@dataclasses.dataclass(frozen=True)
class Odd(Mask):
    def evaluate(self, q, k, look):
        return k == k

    def block(self, q0, q1, k0, k1, look=None):
        return True, True


@pytest.mark.parametrize(
    ("spec", "query", "pool", "reason"),
    [
        (AttentionSpec(1.0, Odd()), ((1, 1, 4, 16), "float32"), ((3, 8, 2, 16), "float32"), "got Odd"),
        (AttentionSpec(1.0), ((1, 1, 4, 16), "float16"), ((3, 8, 2, 16), "float32"), "got float16"),
        (AttentionSpec(1.0), ((1, 1, 4, 16), "float32"), ((3, 8, 2, 16), "float8_e4m3fn"), "got float8_e4m3fn"),
        (AttentionSpec(1.0), ((1, 1, 97, 16), "float32"), ((3, 8, 1, 16), "float32"), "one KV head, got 97"),
        (AttentionSpec(1.0), ((1, 1, 1, 1032), "float32"), ((3, 8, 1, 1032), "float32"), "1024 wide, got 1032"),
    ],
)
def test_what_is_declined_has_a_reason(spec, query, pool, reason):
    query, pool = jax.ShapeDtypeStruct(*query), jax.ShapeDtypeStruct(*pool)
    assert reason in paged_attention_refusal(spec, query, pool, pool, num_keys=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_keys": 10**6}, "more keys are read than pages hold"),
        ({"rows_k": np.zeros((4, 1, 2, 8), np.float32)}, "rows must be"),
        ({"leaves": [np.zeros(3, np.int32)]}, "axis of 1 or all requests"),
        ({"pool_v": np.zeros((3, 9, 2, 16), np.float32)}, "pools must be"),
        ({"layers": [np.int32(0)]}, "pools must be"),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes, message):
    inputs = dataclasses.replace(make_step(STEPS["decode"]), **changes)
    with pytest.raises(Exception, match=f"fastgpt_paged_attention: .*{message}"):
        jax.block_until_ready(run(STEPS["decode"], inputs))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instructions_compute_the_same(isa):
    contract = Path(__file__).parents[1] / "test_attention.py"
    paths = [f"{__file__}::test_steps_write_and_attend", f"{contract}::test_every_implementation_computes_attention"]
    environment = os.environ | {"FASTGPT_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "pages or cpu", *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
