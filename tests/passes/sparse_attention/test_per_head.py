"""Heads with masks of their own: which become operations of their own, with which masks, and what stays whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import passes
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.engine.llm import LLM
from passes import compat
from passes.attention.rewrite import attention
from passes.attention.simplify_mask import decompose
from passes.manager import PassOptions
from passes.masks import Offset
from passes.reader import trace
from passes.replay import evaluate
from passes.simplify import simplify
from passes.sparse_attention.parser import parse_sparsity
from passes.sparse_attention.per_head import per_head
from passes.sparse_attention.sparse_attention import sparse_attention
from passes.validation import validate
from tests.artifact.built import tokens

N, K, H, T = 4, 2, 8, 12
CAUSAL = Offset(0, None)


def narrow_heads(query, key):
    near = query[:, None] - key < 3
    return jnp.where(jnp.arange(N)[:, None, None] < 2, near, True)


def windows(query, key):
    return query[:, None] - key < jnp.asarray([3, 3, 5, 5])[:, None, None]


def windows_by_powers(query, key):
    return query[:, None] - key < (2 ** (jnp.arange(N) // 2 + 1))[:, None, None]


def one_for_all(query, key):
    return query[:, None] - key < jnp.where(jnp.arange(N) < 9, 3, 5)[:, None, None]


RULES = {
    "a selection": (narrow_heads, [(2, Offset(0, 2)), (2, CAUSAL)]),
    "a constant array": (windows, [(2, Offset(0, 2)), (2, Offset(0, 4))]),
    "arithmetic": (windows_by_powers, [(2, Offset(0, 1)), (2, Offset(0, 3))]),
    "no difference": (one_for_all, [(4, Offset(0, 2))]),
}


def attend(rule, q, k, v, slopes):
    """Grouped heads of one or more requests, with a bias that knows the head too."""
    index = jnp.arange(T)
    seen = (index[:, None] >= index) & rule(index, index)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, axis=2)) * np.float32(H**-0.5)
    scores = scores - slopes[:, None, None] * (index[:, None] - index).astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scores, np.float32(-1e30)), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // K, axis=2))


def operands(batch=2):
    random = np.random.RandomState(0)
    q, k, v = (random.randn(batch, T, heads, H).astype(np.float32) for heads in (N, K, K))
    return q, k, v, np.array([0.1, 0.2, 0.3, 0.4], np.float32)


def recognised(fn, *args):
    graph, _ = trace(fn, *args)
    simplify(graph)
    assert attention(graph).matched == 1
    return graph


def attentions(graph):
    return [op for op in graph.ops if op.name == "attention"]


def masks(graph):
    forms = [(op.operands[0].shape[2], decompose(op.params["score"])) for op in attentions(graph)]
    return [(heads, form.mask) for heads, form in forms if form is not None]


@pytest.mark.parametrize(
    "name, batch",
    [
        ("a selection", 1),
        ("a constant array", 2),
        *(pytest.param(name, batch, marks=pytest.mark.slow) for name in RULES for batch in (1, 2)),
    ],
)
def test_heads_with_masks_of_their_own_become_operations_of_their_own(name, batch):
    rule, expected = RULES[name]
    fn, args = lambda *args: attend(rule, *args), operands(batch)
    graph = recognised(fn, *args)
    result = per_head(graph)
    assert result.matched == 1 and not result.remarks
    assert masks(graph) == expected
    assert [op.operands[1].shape[2] for op in attentions(graph)] == [heads * K // N for heads, _ in expected]
    np.testing.assert_allclose(compat.quick_jit(lambda *x: evaluate(graph, x))(*args)[0], jax.jit(fn)(*args), atol=2e-6)
    (rewrite,) = result.rewrites
    assert validate(rewrite.before, rewrite.after, rewrite.numerics).status == "valid"
    assert per_head(graph).matched == 0


def test_gradients_flow_through_the_pieces():
    args = operands()
    fn = lambda *args: attend(narrow_heads, *args)
    pieces = passes.apply(fn, "simplify,attention,per_head", options=PassOptions(is_validating=False))
    grads = [jax.jit(jax.grad(lambda *x, fn=fn: jnp.sum(jnp.sin(fn(*x))), (0, 1, 2, 3)))(*args) for fn in (fn, pieces)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_masks_of_all_heads_alike_are_left_alone():
    graph = recognised(lambda *args: attend(lambda q, k: q[:, None] - k < 3, *args), *operands())
    result = per_head(graph)
    assert (result.matched, result.remarks, len(attentions(graph))) == (0, (), 1)


def test_rules_known_only_at_run_time_stay_whole_and_say_so():
    fn = lambda reach, *args: attend(lambda q, k: q[:, None] - k < reach[:, None, None], *args)
    graph = recognised(fn, np.array([3, 4, 5, 6], np.int32), *operands())
    (remark,) = per_head(graph).remarks
    assert "known only when it runs" in remark.reason and len(attentions(graph)) == 1
    (remark,) = sparse_attention(graph, parse_sparsity("all: window(2)")).remarks
    assert "known only when it runs" in remark.reason


def test_rules_that_change_back_and_forth_stay_whole_and_say_so():
    def fn(q, k, v):
        index = jnp.arange(T)
        seen = (index[:, None] - index < 3) | (jnp.arange(16) % 2 == 0)[:, None, None]
        scores = jnp.where(seen & (index[:, None] >= index), jnp.einsum("btnh,bsnh->bnts", q, k), -1e30)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)

    graph = recognised(fn, *np.random.RandomState(0).randn(3, 2, T, 16, H).astype(np.float32))
    (remark,) = per_head(graph).remarks
    assert "16 operations, and at most 8 are made" in remark.reason and len(attentions(graph)) == 1


def test_what_is_asked_for_is_laid_over_the_masks_of_each_head():
    graph = recognised(lambda *args: attend(narrow_heads, *args), *operands())
    result = sparse_attention(graph, parse_sparsity("heads[1:]: window(4)"))
    assert masks(graph) == [(1, Offset(0, 2)), (1, Offset(0, 2)), (2, Offset(0, 3))] and result.matched == 1
    (rewrite,) = result.rewrites
    assert validate(rewrite.before, rewrite.after, rewrite.numerics).status == "valid"


def by_heads(windows):
    """A model whose heads see as far as `windows` says."""

    def fn(params, t):
        x = params["embed"][t]
        B, T = t.shape
        for w in params["layers"]:
            q, k, v = ((x @ w[name]).reshape(B, T, N, H) for name in "qkv")
            away = jnp.arange(T)[:, None] - jnp.arange(T)
            seen = (away >= 0) & (away < jnp.asarray(windows)[:, None, None])
            scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * np.float32(H**-0.5), -1e30)
            out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
            x = x + out.reshape(B, T, N * H) @ w["o"]
        return x @ params["embed"].T

    random = np.random.RandomState(0)
    normal = lambda *shape: random.randn(*shape).astype(np.float32)
    layers = [{name: normal(N * H, N * H) / 3 for name in "qkvo"} for _ in range(2)]
    return fn, {"embed": normal(23, N * H), "layers": layers}


@pytest.mark.slow
def test_a_model_of_windows_by_head_is_served_with_few_rows_read_and_made_sparse_at_its_positions():
    config = CompileConfig(
        max_model_len=24,
        max_num_seqs=2,
        page_size=5,
        prefill_buckets=(4,),
        max_num_batched_tokens=8,
        decode_buckets=(2,),
        max_logprobs=5,
        pass_options=PassOptions(is_validating=False),
    )

    def served(windows, **more):
        return tokens(LLM(compile_model(*by_heads(windows), dataclasses.replace(config, **more))))

    plain = served([3, 3, 50, 50], pipeline="simplify")
    assert served([3, 3, 50, 50], pipeline="fuse") == plain
    asked = served([3, 3, 4, 4], pipeline="simplify")
    assert asked != plain
    assert served([3, 3, 50, 50], sparse="all: window(4)") == asked
