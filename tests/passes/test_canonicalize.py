import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from passes.canonicalize import canonicalize
from passes.simplify import simplify
from passes.verify import verify
from tests.passes.graphs import assert_same_bits, names, read, run
from tests.passes.programs import PROGRAMS

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
AWKWARD = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1.5, -2.0, 1e-3])


def check(fn, *args, hits, left):
    """`canonicalize` matches `hits` times, leaves the operations `left`, changes no bit, and finds nothing again."""
    graph = read(fn, *args)
    assert canonicalize(graph).matched == hits
    verify(graph)
    assert sorted(names(graph).elements()) == sorted(left.split())
    assert_same_bits(run(graph, *args), jax.jit(fn)(*args))
    assert canonicalize(graph).matched == 0


EXACT = {
    "mul by one": (lambda x: x * 1.0, 1),
    "one mul": (lambda x: 1.0 * x, 1),
    "mul by ones": (lambda x: x * jnp.ones_like(x), 1),
    "div by one": (lambda x: x / 1.0, 1),
    "add minus zero": (lambda x: x + -0.0, 1),
    "sub zero": (lambda x: x - 0.0, 1),
    "max of -inf": (lambda x: jnp.maximum(x, -jnp.inf), 1),
    "min of inf": (lambda x: jnp.minimum(jnp.inf, x), 1),
    "max of itself": (lambda x: jnp.maximum(x, x), 1),
    "double negation": (lambda x: lax.neg(lax.neg(x)), 1),
    "same case": (lambda x: lax.select(x > 0, x, x), 1),
    "known case": (lambda x: lax.select(jnp.zeros(x.shape, bool), x * 2, x), 1),
    "power of one": (lambda x: lax.integer_pow(x, 1), 1),
    "wider and back": (lambda x: x.astype(jnp.float32).astype(x.dtype), None),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT)
def test_identities_hit_on_every_float_dtype_and_change_no_bit(name, dtype):
    fn, hits = EXACT[name]
    x = AWKWARD.astype(dtype)
    graph = read(fn, x)
    matched = simplify(graph).matched
    assert graph.outputs == graph.inputs and not graph.ops
    assert hits is None or matched >= hits
    assert_same_bits(run(graph, x), x)
    assert simplify(graph).matched == 0


NEAR_MISSES = {
    "add zero loses a sign": lambda x: x + 0.0,
    "sub minus zero loses a sign": lambda x: x - -0.0,
    "mul by zero is not zero": lambda x: x * 0.0,
    "sub of itself is not zero": lambda x: x - x,
    "div of itself is not one": lambda x: x / x,
    "max of inf": lambda x: jnp.maximum(x, jnp.inf),
    "min of zero": lambda x: jnp.minimum(x, 0.0),
    "mul by nearly one": lambda x: x * 1.0078125,
    "div of one": lambda x: 1.0 / x,
    "sub from zero": lambda x: -0.0 - x,
    "power of two": lambda x: lax.integer_pow(x, 2),
    "one over another axis": lambda x: x[:, None] * jnp.ones((1, 2), x.dtype),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_do_not_fire(name, dtype):
    x = AWKWARD.astype(dtype)
    graph = read(NEAR_MISSES[name], x)
    before = names(graph)
    simplify(graph)
    assert names(graph) == before
    assert_same_bits(run(graph, x), jax.jit(NEAR_MISSES[name])(x))


def test_narrowing_and_back_stays():
    x = jnp.float32(1.001)
    large = jnp.bfloat16(1e20)
    check(lambda x: x.astype(jnp.float16).astype(jnp.bfloat16), large, hits=0, left="convert_element_type " * 2)
    check(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x, hits=0, left="convert_element_type " * 2)
    check(
        lambda x: x.astype(jnp.float16).astype(jnp.bfloat16).astype(jnp.float16),
        x,
        hits=0,
        left="convert_element_type " * 3,
    )


def test_integers_that_a_float_cannot_hold_stay():
    check(
        lambda x: x.astype(jnp.float32).astype(jnp.int32),
        jnp.int32(2**24 + 1),
        hits=0,
        left="convert_element_type " * 2,
    )


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.int8])
def test_integer_identities(dtype):
    x = jnp.arange(8).astype(dtype)
    low, high, ones = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max, np.array(-1).astype(dtype)
    check(lambda x: (x + 0, x - 0, x * 1, x | 0, x ^ 0, x & ones, ~~x), x, hits=7, left="not")
    check(lambda x: (jnp.maximum(x, low), jnp.minimum(high, x), x & x, x | x), x, hits=4, left="")


def test_boolean_identities():
    x = jnp.array([True, False])
    true, false = jnp.ones(2, bool), jnp.zeros(2, bool)
    graph = read(lambda x: (x & true, false | x, x & false, true | x), x)
    simplify(graph)
    assert names(graph) == {}
    assert_same_bits(run(graph, x), [x, x, false, true])


def test_complex_products_stay():
    x = jnp.array([jnp.inf + 0j, 1 + 2j])
    check(lambda x: (x * (1 + 0j), x / (1 + 0j)), x, hits=0, left="mul div")


def test_layout_operations_merge():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    check(lambda x: x.transpose(1, 2, 0).transpose(2, 0, 1), x, hits=2, left="transpose")
    check(lambda x: x.transpose(1, 0, 2).transpose(0, 2, 1), x, hits=1, left="transpose transpose")
    check(lambda x: x.reshape(6, 4).reshape(2, 3, 4), x, hits=2, left="reshape")
    check(lambda x: lax.slice(x, (0, 0, 0), (2, 3, 4)), x, hits=1, left="")
    check(lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4)), x, hits=0, left="slice")
    check(lambda x: lax.pad(x, 0.0, [(0, 0, 0)] * 3), x, hits=1, left="")
    check(lambda x: lax.pad(x, 0.0, [(1, -1, 0)] * 3), x, hits=0, left="pad")
    spread = lambda x: lax.broadcast_in_dim(
        lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)), (5, 7, 2, 3, 4), (0, 2, 3, 4)
    )
    check(spread, x, hits=1, left="broadcast_in_dim broadcast_in_dim")


def test_scalar_arithmetic_folds_to_what_the_operations_give():
    def fn(x):
        head_dim = jnp.asarray(x.shape[-1], x.dtype)
        return x * lax.rsqrt(head_dim) + jnp.exp(head_dim).astype(jnp.bfloat16).astype(x.dtype)

    x = jnp.arange(3.0)
    graph = read(fn, x)
    canonicalize(graph)
    assert names(graph) == {"mul": 1, "add": 1}
    assert_same_bits(run(graph, x), fn(x))


def test_folding_works_while_another_trace_is_open():
    def fn(x):
        canonicalize(graph)
        return x

    graph = read(lambda x: x + lax.rsqrt(jnp.float32(7.0) * 2.0), jnp.ones(3))
    jax.jit(fn)(1.0)
    assert names(graph) == {"add": 1}


def test_operands_of_commutative_operations_are_ordered():
    x, y = jnp.arange(3.0), jnp.arange(3.0) + 1
    check(
        lambda x, y: (y + x, y * x, 2.0 * x, lax.lt(jnp.float32(1.0), x), y >= x),
        x,
        y,
        hits=5,
        left="add mul mul gt le",
    )
    check(lambda x, y: (x + y, x * y, x * 2.0, x > 1.0, x <= y), x, y, hits=0, left="add mul mul gt le")


def test_operands_that_order_matters_to_stay():
    x, y = jnp.array([0.0, -0.0]), jnp.array([-0.0, 0.0])
    check(lambda x, y: (y - x, y / x, jnp.maximum(y, x), jnp.minimum(y, x)), x, y, hits=0, left="sub div max min")


def test_a_known_branch_is_inlined():
    graph = read(lambda x: lax.switch(1, [jnp.sin, jnp.cos, jnp.tan], x), jnp.ones(3))
    canonicalize(graph)
    assert names(graph) == {"cos": 1}


def test_a_branch_that_is_not_known_stays():
    graph = read(lambda x, i: lax.switch(i, [jnp.sin, jnp.cos], x), jnp.ones(3), jnp.int32(0))
    canonicalize(graph)
    assert names(graph)["cond"] == 1


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_carries_that_never_change_become_constants(loop):
    def fn(x, w, n):
        if loop == "scan":  # JAX itself sees plain forwarding; here it is hidden behind an identity
            return lax.scan(lambda c, _: ((c[0] @ c[1], c[1] * 1.0), None), (x, w), length=3)[0]
        return lax.while_loop(lambda c: c[2] < n, lambda c: (c[0] @ c[1], c[1], c[2] + 1), (x, w, 0))[:2]

    args = jnp.ones((2, 2)), jnp.full((2, 2), 0.5), jnp.int32(3)
    graph = read(fn, *args)
    assert canonicalize(graph).matched >= 1
    verify(graph)
    assert graph.outputs[1] is graph.inputs[1]
    (op,) = [op for op in graph.ops if op.name == loop]
    assert len(op.results) == (1 if loop == "scan" else 2)
    assert_same_bits(run(graph, *args), jax.jit(fn)(*args))


def test_swapped_carries_stay():
    graph = read(lambda x, y: lax.scan(lambda c, _: (c[::-1], None), (x, y), length=3)[0], jnp.ones(2), jnp.zeros(2))
    assert canonicalize(graph).matched == 0
    assert_same_bits(run(graph, jnp.ones(2), jnp.zeros(2)), [jnp.zeros(2), jnp.ones(2)])


def test_scalar_constants_and_repeated_operands_move_into_bodies():
    def fn(x, w):
        scale = jnp.float32(2.0)
        return lax.cond(x.sum() > 0, lambda a, b, s: a @ b * s, lambda a, b, s: a - b * s, w, w, scale)

    args = jnp.ones((2, 2)), jnp.full((2, 2), 0.5)
    graph = read(fn, *args)
    canonicalize(graph)
    verify(graph)
    (op,) = [op for op in graph.ops if op.name == "cond"]
    assert len(op.operands) == 2 and all(len(region.inputs) == 1 for region in op.regions)
    assert_same_bits(run(graph, *args), jax.jit(fn)(*args))


def test_identities_fire_inside_regions():
    fn = lambda x: lax.scan(lambda c, r: (c * 1.0 + r, lax.neg(lax.neg(c))), x[0], x)
    graph = read(fn, jnp.ones((3, 2)))
    assert simplify(graph).matched >= 2
    assert names(graph) == {"scan": 1, "add": 1, **({} if "slice" not in names(graph) else {"slice": 1, "squeeze": 1})}


def test_taps_and_stopped_gradients_stay():
    fn = lambda x: lax.stop_gradient(checkpoint_name(x, "tap"))
    check(fn, jnp.ones(3), hits=0, left="name stop_gradient")


def test_weak_types_of_outputs_stay():
    graph = read(lambda x: lax.convert_element_type(x, jnp.float32), 1.5)
    assert graph.inputs[0].aval.weak_type and not graph.outputs[0].aval.weak_type
    assert canonicalize(graph).matched == 0
    graph = read(lambda x: lax.neg(lax.convert_element_type(x, jnp.float32)), 1.5)
    assert canonicalize(graph).matched == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_second_run_of_simplify_changes_nothing(name):
    graph = read(PROGRAMS[name], jnp.sin(jnp.arange(16.0)).reshape(4, 4))
    simplify(graph)
    verify(graph)
    assert simplify(graph).matched == 0
