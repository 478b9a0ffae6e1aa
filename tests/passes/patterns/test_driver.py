"""The driver: fixed point, order of operations, endless rules, escapes, bisection, remarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.numerics import Numerics
from passes.patterns.driver import apply_rules
from passes.patterns.pattern import Capture, Contract, Number, Reduce, apply
from passes.patterns.rule import RewriteRule
from passes.rewrite import RewriteCounter
from passes.simplify import simplify
from passes.verify import verify
from tests.passes.graphs import names, read, run

X = jnp.linspace(-2.0, 2.0, 24).reshape(2, 3, 4)


def rule(pattern, build, **options):
    return RewriteRule("test", pattern, build, Numerics.REASSOCIATES, **options)


def like_root(b):
    return tuple(b.match.axes.expand(dim) for dim in b.match.dims)


def twice_as_sum(b):
    x = b.array("x", *like_root(b), is_full=True)
    return b.result(x + x, *like_root(b))


TWICE = rule(apply("mul", Capture("x"), Number(2.0)), twice_as_sum)


def read_simple(fn, *args):
    graph = read(fn, *args)
    simplify(graph)
    return graph


def test_every_site_is_rewritten_in_loop_bodies_too():
    def fn(x):
        y, _ = jax.lax.scan(lambda c, _: (c * 2.0 + 1.0, None), x, None, length=3)
        return y * 2.0

    graph = read_simple(fn, X)
    result = apply_rules(graph, [TWICE])
    verify(graph)
    assert result.matched == 2 and len(result.rewrites) == 2 and "mul" not in names(graph)
    np.testing.assert_allclose(run(graph, X)[0], fn(X), rtol=1e-6)
    assert apply_rules(graph, [TWICE]).matched == 0


def test_a_rule_that_matches_what_it_makes_is_named():
    endless = rule(
        apply("mul", Capture("x"), Number(2.0)), lambda b: b.result(b.array("x", *like_root(b)) * 2.0, *like_root(b))
    )
    with pytest.raises(RuntimeError, match="rule test matches what rewrites made"):
        apply_rules(read_simple(lambda x: x * 2.0, X), [endless])


def test_two_rules_that_undo_each_other_are_found_out():
    back = rule(
        apply("add", Capture("x"), Capture("x")),
        lambda b: b.result(b.array("x", *like_root(b)) * 2.0, *like_root(b)),
    )
    with pytest.raises(RuntimeError, match="again and again"):
        apply_rules(read_simple(lambda x: x * 2.0, X), [TWICE, back])


def test_what_is_read_elsewhere_is_kept_and_told():
    square_root = rule(
        apply("sqrt", apply("mul", Capture("x"), Number(2.0))),
        lambda b: b.result(jnp.sqrt(b.array("x", *like_root(b)) + 0.0), *like_root(b)),
    )

    def fn(x):
        y = x * 2.0
        return jnp.sqrt(y), y

    result = apply_rules(read_simple(fn, X), [square_root])
    assert result.matched == 0
    (remark,) = result.remarks
    assert "read elsewhere" in str(remark) and "test_driver.py" in str(remark)


def test_a_replacement_that_gives_another_shape_is_an_error():
    wrong = rule(apply("mul", Capture("x"), Number(2.0)), lambda b: jnp.zeros(3))
    with pytest.raises(RuntimeError, match="rule test gives"):
        apply_rules(read_simple(lambda x: x * 2.0, X), [wrong])


def test_a_counter_stops_between_two_rewrites():
    graph = read_simple(lambda x: (x * 2.0) * x + (x + 1.0) * 2.0, X)
    counter = RewriteCounter(limit=1)
    assert apply_rules(graph, [TWICE], counter).matched == 1
    assert len(counter.made) == 1 and counter.made[0].startswith("test at test_driver.py")
    verify(graph)


def test_stop_gradient_is_no_view():
    same = rule(apply("mul", Capture("x"), Capture("x")), lambda b: b.array("x", *like_root(b)))
    graph = read_simple(lambda x: x * jax.lax.stop_gradient(x), X)
    assert apply_rules(graph, [same]).matched == 0


def test_operands_come_in_any_order_and_grouping():
    a, b, c = (jnp.full((2, 3), v) for v in (3.0, 5.0, 7.0))
    pattern = apply("mul", apply("exp", Capture("a")), apply("mul", apply("sin", Capture("b")), Capture("c")))
    found = []

    def build(builder):
        found.append(True)
        return builder.result(builder.array("c", *like_root(builder)), *like_root(builder))

    for fn in (
        lambda a, b, c: jnp.exp(a) * (jnp.sin(b) * c),
        lambda a, b, c: (jnp.sin(b) * jnp.exp(a)) * c,
        lambda a, b, c: c * (jnp.exp(a) * jnp.sin(b)),
    ):
        found.clear()
        assert apply_rules(read_simple(fn, a, b, c), [rule(pattern, build)]).matched == 1


def test_axes_are_told_apart_by_role():
    """A sum along what a product contracts, in any layout; along something else it is nothing."""
    pattern = apply("mul", Reduce("reduce_sum", Capture("x"), "S"), Contract(Capture("x"), Capture("w"), "S"))
    zero = rule(pattern, lambda b: b.result(jnp.zeros(b.match.root.shape), *b.match.dims))
    w = jnp.ones((4, 4))
    same = read_simple(lambda x, w: x.sum(-1, keepdims=True) * (x @ w), X, w)
    turned = read_simple(lambda x, w: x.sum(-1)[..., None] * jnp.einsum("ij,abi->jba", w, x).transpose(2, 1, 0), X, w)
    other = read_simple(lambda x, w: x.sum(1, keepdims=True) * (x @ w), X, w)
    assert [apply_rules(g, [zero]).matched for g in (same, turned, other)] == [1, 1, 0]


def test_a_diagonal_is_no_match():
    """Rows and columns are of one size, and found equal they would be one axis."""
    zero = rule(apply("mul", Capture("x"), Capture("x")), lambda b: b.result(jnp.zeros(b.match.root.shape)))
    assert apply_rules(read_simple(lambda x: x * x.T, jnp.ones((3, 3))), [zero]).matched == 0
