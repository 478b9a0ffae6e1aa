"""Patterns from functions: layouts and spellings that match, near misses that do not, and what a miss says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.numerics import Numerics
from passes.ops.norms import rms_norm
from passes.patterns.by_example import NotAPattern, by_example
from passes.patterns.driver import apply_rules
from passes.patterns.rule import RewriteRule
from passes.replay import evaluate
from passes.simplify import simplify
from tests.passes.graphs import read


def norm(x, w, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * w[None, None]


def build(b):
    span = b.match.span("span 0")
    groups = b.match.rows(span)
    x, w = b.array("x", *groups, is_full=True), b.array("w", span, is_full=True)
    return b.result(rms_norm(x, w, eps=b.match.number("eps"), dtype=b.match.root.dtype), *groups)


PATTERN = by_example(norm, (3, 5, 7), (7,), numbers={"eps": 1e-5})
RULE = RewriteRule("norm", PATTERN, build, Numerics.REASSOCIATES, landmarks=(frozenset({"rsqrt"}),))
X, W = jnp.asarray(np.random.RandomState(0).randn(2, 8, 8), jnp.float32), jnp.linspace(0.5, 1.5, 8)


def matched(fn, *args):
    graph = read(fn, *args)
    simplify(graph)
    result = apply_rules(graph, [RULE])
    np.testing.assert_allclose(evaluate(graph, args)[0], fn(*args), rtol=2e-5, atol=2e-5)
    return result


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: norm(x, w, 1e-3),
        lambda x, w: w[None, None] * (jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * x),
        lambda x, w: x * (w[None, None] * jax.lax.rsqrt(jnp.mean(x**2, -1)[..., None] + 1e-6)),
        lambda x, w: x * jax.lax.rsqrt(jnp.mean(x**2, 1, keepdims=True) + 1e-6) * w[None, :, None],
        lambda x, w: norm(x.reshape(16, 1, 8), w, 1e-5),
        lambda x, w: norm(x.transpose(1, 0, 2), w, 1e-5).transpose(1, 0, 2),
    ],
)
def test_layouts_and_spellings(fn):
    assert matched(fn, X, W).matched == 1


@pytest.mark.parametrize(
    "fn, reason",
    [
        (lambda x, w: x * jax.lax.rsqrt(jnp.mean(x**2, 1, keepdims=True) + 1e-5) * w[None, None], "the example's axes"),
        (lambda x, w: x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) / 9.0 + 1e-5) * w[None, None], "numbers"),
        (lambda x, w: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * x[:1], "the example's axes"),
        (lambda x, w: (x + 1) * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * w[None, None], "x again"),
        (lambda x, w: x * jax.lax.rsqrt(jnp.mean(jnp.abs(x), -1, keepdims=True) + 1e-5) * w[None, None], "found abs"),
    ],
)
def test_near_misses_say_why(fn, reason):
    result = matched(fn, X, W)
    assert result.matched == 0
    assert any(reason in str(r) and str(r).startswith("test_by_example.py:") for r in result.remarks), result.remarks


def test_a_mean_is_compared_at_the_captured_shape():
    """The size in the example is 7; the one that counts is that of the match."""
    by_seven = lambda x, w: x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) / 7.0 + 1e-5) * w[None, None]
    assert matched(by_seven, X, W).matched == 0
    assert matched(by_seven, X[..., :7], W[:7]).matched == 1


def test_contractions_match_by_role():
    def project(x, w):
        return jnp.tanh(jnp.einsum("bd,df->bf", x, w))

    rule = RewriteRule(
        "project",
        by_example(project, (3, 5), (5, 7)),
        lambda b: b.result(jnp.zeros([axis.size for axis in b.match.axes.flat(b.match.dims)]), *b.match.dims),
        Numerics.REASSOCIATES,
    )
    w = jnp.ones((8, 3))
    for fn, count in (
        (lambda x, w: jnp.tanh(jnp.einsum("df,abd->abf", w, x)), 1),
        (lambda x, w: jnp.tanh(jnp.einsum("fd,abd->abf", w.T, x)), 1),
        (lambda x, w: jnp.tanh(jnp.einsum("abd,acd->abc", x, x)), 0),
    ):
        graph = read(fn, X, w)
        simplify(graph)
        assert apply_rules(graph, [rule]).matched == count


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jax.lax.scan(lambda c, row: (c + row, None), x[0], x)[0],
        lambda x: jnp.cumsum(x, 0) @ jnp.eye(5),
    ],
)
def test_what_no_pattern_can_say_is_refused(fn):
    with pytest.raises(NotAPattern):
        by_example(fn, (3, 5))
