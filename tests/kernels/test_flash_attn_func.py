"""`flash_attn_func` against FlashAttention's documented meaning, written out pair by pair in NumPy."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastgpt_jax
from fastgpt_jax.kernels.attention import flash, pallas_tpu

B, N, K, H = 2, 4, 2, 8


def pair_by_pair(q, k, v, *, causal=False, window_size=(-1, -1), scale, softcap=0.0, slopes=None, sinks=None):
    T, S = q.shape[1], k.shape[1]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((B, N, T), -np.inf)
    left, right = window_size[0], 0 if causal else window_size[1]
    for b, n, i in np.ndindex(B, N, T):
        place = i + S - T
        first = 0 if left < 0 else max(0, place - left)
        last = S - 1 if right < 0 else min(S - 1, place + right)
        logits = []
        for j in range(first, last + 1):
            score = scale * (q[b, i, n] @ k[b, j, n // (N // K)])
            score = softcap * math.tanh(score / softcap) if softcap else score
            logits.append(score - (0 if slopes is None else slopes[b, n] * abs(place - j)))
        if not logits and sinks is None:
            continue
        lse[b, n, i] = np.logaddexp.reduce([*logits, *([] if sinks is None else [sinks[n]])])
        for j, score in zip(range(first, last + 1), logits, strict=True):
            out[b, i, n] += math.exp(score - lse[b, n, i]) * v[b, j, n // (N // K)]
    return out, lse


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


CASES = [
    {},
    {"causal": True, "softmax_scale": 0.7},
    {"causal": True, "window_size": (3, 5)},
    {"window_size": (2, 1), "softcap": 1.5},
    {"window_size": (-1, 0), "alibi_slopes": 2},
    {"window_size": (0, -1), "sinks": True},
    {"causal": True, "alibi_slopes": 1, "softcap": 2.0, "sinks": True},
]


@pytest.mark.parametrize(("T", "S"), [(6, 11), pytest.param(9, 7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case) or "plain")
def test_flash_attn_func_means_what_the_package_documents(case, T, S):
    q, k, v = drawn(1, B, T, N, H), drawn(2, B, S, K, H), drawn(3, B, S, K, H)
    slopes, sinks = np.abs(drawn(4, B, N)), drawn(5, N)
    options, wanted = dict(case), {"scale": case.get("softmax_scale", H**-0.5), "softcap": case.get("softcap", 0.0)}
    if rank := options.pop("alibi_slopes", None):
        given = slopes if rank == 2 else slopes[0]
        options["alibi_slopes"], wanted["slopes"] = jnp.asarray(given, jnp.float32), np.broadcast_to(given, (B, N))
    if options.pop("sinks", False):
        options["sinks"], wanted["sinks"] = jnp.asarray(sinks, jnp.float32), sinks
    wanted |= {name: case[name] for name in ("causal", "window_size") if name in case}
    fn = functools.partial(fastgpt_jax.flash_attn_func, return_lse=True, implementation="xla_blocked", **options)
    out, lse = jax.jit(fn)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    want_out, want_lse = pair_by_pair(q, k, v, **wanted)
    np.testing.assert_allclose(out, want_out, rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=2e-6)


def arrays(T: int = 6, S: int = 9, dtype: str = "float32"):
    return tuple(jnp.asarray(drawn(i, *s), dtype) for i, s in enumerate([(B, T, N, H), (B, S, K, H), (B, S, K, H)]))


def test_lse_is_returned_on_request_only():
    out = jax.eval_shape(functools.partial(fastgpt_jax.flash_attn_func, causal=True), *arrays())
    assert out.shape == (B, 6, N, H) and out.dtype == "float32"


def test_it_is_differentiated_under_jit_and_vmap():
    def loss(q, k, v):
        return (fastgpt_jax.flash_attn_func(q, k, v, causal=True) ** 2).sum()

    q, k, v = arrays(dtype="bfloat16")
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert [g.dtype for g in gradients] == ["bfloat16"] * 3 and all(np.isfinite(g).all() for g in gradients)
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(*stacked)
    np.testing.assert_allclose(np.asarray(mapped[0], np.float32), np.asarray(gradients[0], np.float32), atol=2**-6)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_the_platform_that_is_lowered_for_decides(platform):
    """No device is asked: the TPU kernel is in a program for TPUs, lowered here, and in no other."""
    lowered = jax.jit(fastgpt_jax.flash_attn_func).trace(*arrays()).lower(lowering_platforms=(platform,))
    assert ("tpu_custom_call" in lowered.as_text()) == (platform == "tpu")


def test_what_the_kernel_declines_runs_elsewhere_and_a_named_kernel_says_so():
    q, k, v = arrays(dtype="float16")
    assert jax.eval_shape(fastgpt_jax.flash_attn_func, q, k, v).dtype == "float16"
    with pytest.raises(NotImplementedError, match="pallas_tpu declines: queries, keys and values must all be float32"):
        fastgpt_jax.flash_attn_func(q, k, v, implementation="pallas_tpu")


@pytest.mark.slow
def test_a_named_kernel_is_interpreted_where_it_cannot_run():
    want = fastgpt_jax.flash_attn_func(*arrays(), causal=True, implementation="reference")
    got = fastgpt_jax.flash_attn_func(*arrays(), causal=True, implementation="pallas_tpu")
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (-2, 0)}, "window_size counts keys before and after"),
        ({"softcap": -1.0}, "soft_cap must be positive"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastgpt_jax.flash_attn_func(*arrays(), **options)


def test_the_best_implementation_is_chosen_by_what_each_supports(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "supports", lambda *args, **kwargs: "not today")
    lowered = jax.jit(lambda *x: flash.flash_attn_func(*x)).trace(*arrays()).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" not in lowered.as_text()
