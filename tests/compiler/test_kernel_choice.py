"""Attentions as they are written, run by the kernels that `select` chooses for them: what is chosen, what is declined
and why, and that nothing is computed otherwise.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import passes
from fastgpt_jax.compiler.kernel_choice import TABLE, target_passes
from fastgpt_jax.kernels.cpu import library
from passes.attention.rewrite import attention
from passes.manager import PassManager
from passes.numerics import Numerics
from passes.reader import trace
from passes.registry import PASSES, Pass, parse_pipeline
from passes.select import PLAIN, Candidate, Target, choose, select
from passes.simplify import simplify

CPU = Target("cpu")
BLOCKED = {"attention": tuple(c for c in TABLE["attention"] if c.name == "xla_blocked")}
"""The blocked kernel wherever it does not decline, whatever it costs."""
FORCED = {**PASSES, "select": Pass("select", partial(select, table=BLOCKED, target=CPU), Numerics.REASSOCIATES)}
T, S, N, K, H = 12, 20, 4, 2, 8


def attend(q, k, v, *, start=0, lo=0, hi=None, fill=-np.inf, is_added=False, bias=None, cap=None, sinks=None):
    """Grouped attention `[B, T, N, H]` of positions `start + t`, written out."""
    k, v = jnp.repeat(k, q.shape[2] // k.shape[2], 2), jnp.repeat(v, q.shape[2] // v.shape[2], 2)
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    s = s if cap is None else cap * jnp.tanh(s / cap)
    s = s if bias is None else s + bias
    distance = start + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    seen = (distance >= lo) & (distance < (hi or 10**6))
    s = s + jnp.where(seen, 0.0, fill) if is_added else jnp.where(seen, s, fill)
    if sinks is None:
        w = jax.nn.softmax(s, -1)
    else:
        joined = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], -1)
        w = jax.nn.softmax(joined, -1)[..., :-1]
    return jnp.einsum("bnts,bsnh->btnh", w, v)


def arrays(*extra, batch=2, num_queries=T):
    rng = np.random.default_rng(0)
    shapes = ((batch, num_queries, N, H), (batch, S, K, H), (batch, S, K, H))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes] + [np.asarray(x) for x in extra]


def alibi(q, k, v, slopes, start):
    distance = start + jnp.arange(T)[:, None] - jnp.arange(S)
    return attend(q, k, v, start=start, bias=-slopes[:, None, None] * distance)


SLOPES, START = np.float32([0.5, 0.25, 0.125, 0.06]), np.int32(5)
FORMS = {
    "causal": (attend, arrays()),
    "behind what is cached": (lambda q, k, v, start: attend(q, k, v, start=start), arrays(START)),
    "window that may hide all, -inf": (lambda q, k, v, start: attend(q, k, v, start=start, hi=30), arrays(START)),
    "window that may hide all, one fill": (
        lambda q, k, v, start: attend(q, k, v, start=start, hi=3, fill=-1e9, cap=5.0),
        arrays(START),
    ),
    "one token a request": (
        lambda q, k, v, start: jax.vmap(lambda q, k, v, n: attend(q[None], k[None], v[None], start=n)[0])(
            q, k, v, start
        ),
        arrays(np.int32([3, 9]), num_queries=1),
    ),
    "ALiBi": (alibi, arrays(SLOPES, START)),
    "a bias by head, query and key": (
        lambda q, k, v, bias: attend(q, k, v, bias=bias),
        arrays(np.random.default_rng(1).standard_normal((N, T, S)).astype(np.float32)),
    ),
    "sinks": (lambda q, k, v, sinks: attend(q, k, v, hi=4, fill=-1e9, is_added=True, sinks=sinks), arrays(SLOPES)),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("window that may hide all, one fill", "ALiBi") else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMS
    ],
)
def test_the_blocked_kernel_computes_what_was_written(name):
    fn, args = FORMS[name]
    graph, _ = trace(fn, *args)
    runs = PassManager(parse_pipeline("simplify,attention,select", FORCED)).run(graph)
    assert [op.name for op in graph.ops if op.name.startswith("attention")] == ["attention.xla_blocked"]
    assert [v.status for v in runs[-1].validations] == ["valid"], runs[-1].result.notes


def op_of(fn, args):
    graph, _ = trace(fn, *args)
    simplify(graph)
    assert attention(graph).matched == 1
    return next(op for op in graph.ops if op.name == "attention")


def a_head_with_a_mask_of_its_own(q, k, v):
    k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
    distance = jnp.arange(T)[:, None] - jnp.arange(S)
    seen = (distance >= 0) & (distance < 2 + 3 * jnp.arange(N)[:, None, None])
    s = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k), -1e9)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)


@pytest.mark.parametrize(
    ("fn", "args", "target", "reason"),
    [
        (a_head_with_a_mask_of_its_own, arrays(), CPU, "the mask is a rule of heads"),
        (
            lambda q, k, v, start: attend(q, k, v, start=start, hi=3, fill=-1e9, is_added=True),
            arrays(START),
            CPU,
            "a query may see no key",
        ),
        (lambda q, k, v, scale: attend(q * scale[:, None], k, v), arrays(SLOPES), Target("gpu"), "it runs on cpu"),
        (attend, arrays(), Target("cpu", 4), "heads are shared by 4 devices"),
    ],
)
def test_the_blocked_kernel_says_why_it_declines(fn, args, target, reason):
    chosen, said = choose(op_of(fn, args), BLOCKED["attention"], target)
    assert chosen is None and f"xla_blocked declines: {reason}" in said


def chosen_for(num_queries, num_keys, batch=1):
    q = jax.ShapeDtypeStruct((batch, num_queries, N, H), jnp.float32)
    kv = jax.ShapeDtypeStruct((batch, num_keys, K, H), jnp.float32)
    graph, _ = trace(lambda q, k, v, start: attend(q, k, v, start=start), q, kv, kv, jnp.zeros((), jnp.int32))
    simplify(graph)
    attention(graph)
    op = next(op for op in graph.ops if op.name == "attention")
    return choose(op, TABLE["attention"], CPU)[0].name


def test_a_cpu_without_native_kernels_runs_long_prompts_in_blocks_and_single_rows_plainly(monkeypatch):
    monkeypatch.setattr(library, "unusable_reason", lambda: "no compiler was there")
    assert chosen_for(256, 1024) == "xla_blocked"
    assert chosen_for(1, 512) == PLAIN
    assert chosen_for(8, 16) == PLAIN


@pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))
def test_a_cpu_prefers_its_native_kernel():
    assert {chosen_for(256, 1024), chosen_for(1, 512), chosen_for(8, 16)} == {"cpu"}


def test_on_a_tpu_the_kernel_of_its_own_comes_first():
    op = op_of(attend, arrays())
    chosen, said = choose(op, TABLE["attention"], Target("tpu"))
    assert isinstance(chosen, Candidate) and chosen.name == "pallas_tpu" and "preferred on tpu" in said
    chosen, said = choose(op, TABLE["attention"], CPU)
    assert "pallas_tpu declines: it runs on tpu, and this is for cpu" in said


@pytest.mark.slow
def test_gradients_flow_through_a_chosen_kernel():
    args = arrays(SLOPES)

    def loss(run):
        return jax.grad(lambda *a: (run(*a) ** 2).sum(), argnums=(0, 1, 2, 3))

    def fn(q, k, v, slopes):
        return alibi(q, k, v, slopes, 5)

    fast = passes.apply(fn, "simplify,attention,select", registry=FORCED)
    for want, have in zip(jax.jit(loss(fn))(*args), jax.jit(loss(fast))(*args), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-5)


def test_the_pass_tells_what_it_is_for():
    assert target_passes(Target("cpu", 4))["select"].detail == "cpu, 4 devices"
