"""Scores taken apart into scale, cap, mask and bias mean what they meant; masks are small and know no length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import compat
from passes.attention.expression import evaluate as evaluate_expression
from passes.attention.predicates import Lifted
from passes.attention.simplify_mask import Decomposed, decompose
from passes.extract import clone
from passes.masks import All, KeyFlag, KeyLength, KeyRange, Offset, QueryRange, Segment, causal, window
from passes.ops.attention import index_grid
from passes.replay import evaluate
from tests.passes.attention.checking import rewritten
from tests.passes.attention.models import MODELS
from tests.passes.attention.spellings import sample

NUM_QUICK, NUM_SAMPLES = 8, 300


def taken_apart(fn, args, *, num_heads=1):
    """The parts of the one attention's scores, its sizes and its leaves."""
    _, graph, remarks = rewritten(fn, args)
    found = [op for op in graph.ops if op.name == "attention"]
    assert len(found) == 1, remarks
    (op,) = found
    leaves = clone(graph)
    (copy,) = [op for op in leaves.ops if op.name == "attention"]
    leaves.outputs = copy.operands[3 : 3 + op.params["num_leaves"]]
    B, T, N, _ = op.operands[0].shape
    values = compat.quick_jit(lambda *xs: evaluate(leaves, xs))(*args) if leaves.outputs else []
    return decompose(op.params["score"]), op.params, (B, T, N, op.operands[1].shape[1]), values


def assert_same_scores(name, parts, params, sizes, leaves):
    core = jnp.asarray(np.random.RandomState(1).randn(*sizes), params["core_dtype"])

    def both(core, *leaves):
        score = evaluate_expression(params["score"], core, index_grid(sizes), leaves)
        expected = jax.nn.softmax(jnp.broadcast_to(score, sizes).astype(jnp.float32), axis=-1)
        return expected, jax.nn.softmax(parts.scores(core.astype(jnp.float32), leaves), axis=-1)

    expected, actual = compat.quick_jit(both)(core, *leaves)
    tolerance = 4e-2 if "bfloat16" in f"{params}" else 1e-5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=name)


def is_in_a_loop(spelling):
    return "nest=scan" in spelling.name or "nest=map" in spelling.name


def check(seed):
    spelling = sample(seed)
    if is_in_a_loop(spelling):
        return None
    parts, params, sizes, leaves = taken_apart(spelling.fn, spelling.args)
    assert parts is not None, spelling.name
    assert_same_scores(spelling.name, parts, params, sizes, leaves)
    return parts


@pytest.mark.parametrize("seed", range(NUM_QUICK))
def test_parts_mean_what_the_scores_meant(seed):
    check(seed)


@pytest.mark.slow
def test_parts_of_many_mean_what_the_scores_meant():
    for seed in range(NUM_QUICK, NUM_SAMPLES):
        check(seed)


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_public_model_mean_what_its_scores_meant(name):
    if name == "mistral":
        pytest.skip("stands in a loop")
    parts, params, sizes, leaves = taken_apart(*MODELS[name]())
    assert parts is not None
    assert_same_scores(name, parts, params, sizes, leaves)


def test_parts_have_the_numbers_of_the_model():
    gemma2, *_ = taken_apart(*MODELS["gemma2"]())
    assert gemma2.soft_cap == pytest.approx(50.0)
    assert gemma2.scale == pytest.approx(1.0)  # it is in the queries
    assert gemma2.mask == Offset(0, 2)
    assert gemma2.bias is None
    gpt2, *_ = taken_apart(*MODELS["gpt2"]())
    assert (gpt2.scale, gpt2.mask) == (pytest.approx(0.5), causal())
    gpt_oss, *_ = taken_apart(*MODELS["gpt_oss"]())
    assert gpt_oss.mask == window(3)
    llama, *_ = taken_apart(*MODELS["llama"]())
    assert llama.mask == causal() & KeyFlag(0)
    decode, *_ = taken_apart(*MODELS["decode_step"]())
    assert decode.mask == KeyLength(0)
    assert isinstance(taken_apart(*MODELS["mpt"]())[0].bias, object)


# ------------------------------------------------------------------------------------------------ single masks
T = S = 8


def mask_of(predicate, *args):
    """The parts of an attention masked by `predicate(q, k, *args)`, q `[T, 1]` and k `[1, S]`."""
    q, k, v = np.random.RandomState(0).randn(3, 2, T, 4).astype(np.float32)

    def fn(q, k, v, *args):
        scores = jnp.einsum("bth,bsh->bts", q, k)
        seen = predicate(jnp.arange(T)[:, None], jnp.arange(S)[None], *args)
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1) @ v

    parts, _, sizes, leaves = taken_apart(fn, (q, k, v, *args))
    assert isinstance(parts, Decomposed)
    return parts, sizes, leaves


PADDED = np.arange(S) < np.array([[3], [8]])
NUMBERS = np.int32([3, 5])

RULES = {
    "causal": (lambda q, k: q >= k, (), causal()),
    "mirrored": (lambda q, k: k <= q, (), causal()),
    "negated": (lambda q, k: ~(k > q), (), causal()),
    "difference": (lambda q, k: k - q < 1, (), causal()),
    "constant": (lambda q, k: np.tril(np.ones((T, S), bool)), (), causal()),
    "window": (lambda q, k: (q - k >= 0) & (q - k < 3), (), window(3)),
    "constant window": (lambda q, k: np.tril(np.triu(np.ones((T, S), bool), -2)), (), window(3)),
    "both sides": (lambda q, k: jnp.abs(q - k) <= 2, (), Offset(-2, 2)),
    "not near": (lambda q, k: (jnp.abs(q - k) > 2) | (k == 0), (), ~Offset(-2, 2) | KeyRange(0, 1)),
    "diagonal": (lambda q, k: q == k, (), Offset(0, 0)),
    "prefix": (lambda q, k: (k < 2) | (q >= k), (), KeyRange(None, 2) | causal()),
    "strided": (lambda q, k: 2 * q - 2 * k >= 0, (), None),
    "rows": (lambda q, k: (q < 4) | (k == 0), (), QueryRange(None, 4) | KeyRange(0, 1)),
    "flags": (lambda q, k, x: x[:, None, :], (PADDED,), KeyFlag(0)),
    "lengths": (lambda q, k, n: k < n[:, None, None], (NUMBERS,), KeyLength(0)),
    "lengths, last": (lambda q, k, n: k <= n[:, None, None], (NUMBERS - 1,), KeyLength(0)),
    "segments": (
        lambda q, k, a: a[:, :, None] == a[:, None, :],
        (np.sort(NUMBERS[:, None] % np.arange(1, 9)),),
        Segment(0, 1),
    ),
    "start": (lambda q, k, n: q + n[:, None, None] >= k, (NUMBERS,), causal()),
    "start window": (
        lambda q, k, n: (q + n[:, None, None] >= k) & (k > q + n[:, None, None] - 6),
        (np.int32([0, 0]),),
        window(6),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_told_by_its_shape(name):
    predicate, args, expected = RULES[name]
    parts, sizes, leaves = mask_of(predicate, *args)
    q, k = jnp.arange(T)[:, None], jnp.arange(S)[None]
    seen = np.broadcast_to(np.asarray(predicate(q, k, *args)), (2, T, S))
    visible = compat.quick_jit(lambda *leaves: parts.visible(sizes, leaves))(*leaves)
    np.testing.assert_array_equal(np.broadcast_to(visible, (2, T, S)), seen)
    if expected is not None:
        assert _normal(parts.mask) == _normal(expected)
    assert (parts.query_start is not None) == name.startswith("start")


def _normal(mask):
    """Without the bounds that no key position can cross."""
    text = repr(mask)
    return text.replace("KeyRange(lo=0,", "KeyRange(lo=None,")


def test_a_rule_that_the_algebra_lacks_stays_a_predicate():
    parts, sizes, leaves = mask_of(lambda q, k: (q // 3 == k // 3) & (q >= k))
    assert any(isinstance(term, Lifted) for term in parts.mask.terms)
    q, k = np.arange(40)[:, None], np.arange(40)[None]
    np.testing.assert_array_equal(parts.mask.contains(q, k), (q // 3 == k // 3) & (q >= k))
    assert parts.mask.block(0, 8, 0, 8)[1] is False or not parts.mask.block(0, 8, 0, 8)[1]


def test_a_rule_for_heads_is_kept_as_a_bias():
    q, k, v = np.random.RandomState(0).randn(3, 2, 4, 6, 4).astype(np.float32)

    def fn(q, k, v):
        scores = jnp.einsum("bnth,bnsh->bnts", q, k)
        near = jnp.abs(jnp.arange(6)[:, None] - jnp.arange(6)) <= jnp.arange(4)[:, None, None]
        return jax.nn.softmax(jnp.where(near, scores, -1e9), axis=-1) @ v

    parts, params, sizes, leaves = taken_apart(fn, (q, k, v))
    assert parts.mask == All()
    assert parts.bias is not None
    assert_same_scores("heads", parts, params, sizes, leaves)


def test_a_small_fill_is_no_mask():
    q, k, v = np.random.RandomState(0).randn(3, 2, 6, 4).astype(np.float32)

    def fn(q, k, v):
        seen = jnp.tril(jnp.ones((6, 6), bool))
        return jax.nn.softmax(jnp.where(seen, q @ k.swapaxes(-1, -2), -5.0), axis=-1) @ v

    assert taken_apart(fn, (q, k, v))[0] is None


def test_a_lifted_mask_is_right_at_lengths_never_traced_and_small():
    segments = np.sort(np.random.RandomState(0).randint(0, 3, (2, S)), axis=-1).astype(np.int32)

    def rule(q, k, length, segment_of_q, segment_of_k):
        near = ((q - k < 3) | (k < 2)) & (q >= k)
        return near & (k < length) & (segment_of_q == segment_of_k)

    def predicate(q, k, lengths, segments):
        return rule(q, k, lengths[:, None, None], segments[:, :, None], segments[:, None, :]) | (q == k)

    parts, *_ = mask_of(predicate, NUMBERS, segments)
    mask = parts.mask
    assert "Lifted" not in repr(mask)
    assert len(repr(mask).encode()) < 1000
    random = np.random.RandomState(1)
    for length in (1, 5, 37, 200):
        wide = np.sort(random.randint(0, 4, length))
        q, k = np.arange(length)[:, None], np.arange(length)[None]
        num_keys = random.randint(1, length + 1)
        expected = rule(q, k, num_keys, wide[:, None], wide[None]) | (q == k)
        by_number = {1: wide, 0: np.asarray(num_keys)}
        leaves = [by_number[_leaf_number(expression)] for expression in parts.leaves]
        np.testing.assert_array_equal(mask.contains(q, k, leaves), expected)


def _leaf_number(expression):
    """Which argument a leaf of the mask is: lengths have no index, segments have."""
    return 1 if set(expression.roles) & {"t", "s"} else 0
