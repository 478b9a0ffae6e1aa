"""Translation validation: what it catches, what it lets pass, and that its reference is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import passes
from passes import compat
from passes.cost import graph_cost
from passes.expand import expand
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.random_inputs import NUM_TRIALS, random_arguments
from passes.registry import Pass, make_registry, parse_pipeline
from passes.result import PassResult
from passes.rewrite import Rewrite, RewriteCounter
from passes.shrink import CannotShrink, regroup, shrink
from passes.validation import InvalidRewrite, Reference, Validator, relative_error, validate
from tests.passes.graphs import names, read, run


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = array(3, 16, 64), array(64)


def norm(x, w):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w


def norm_rearranged(x, w):
    return (x * w) / jnp.sqrt((x * x).sum(-1, keepdims=True) / 64 + 1e-6)


def norm_over_the_wrong_axis(x, w):
    return x * lax.rsqrt(jnp.mean(x * x, -2, keepdims=True) + 1e-6) * w


def wrong_in_the_last_element(x, w):
    return norm(x, w).at[-1, -1, -1].multiply(1 + 1e-6)


def check(before, after, *args, numerics=Numerics.REASSOCIATES, budget=None):
    return validate(read(before, *args), read(after, *args), numerics, budget=budget)


def test_a_rewrite_that_reassociates_is_valid_and_not_exact():
    found = check(norm, norm_rearranged, X, W)
    assert found.status == "valid" and 0 < found.error < 1e-12 and found.seconds > 0
    found = check(norm, norm_rearranged, X, W, numerics=Numerics.EXACT)
    assert found.status == "invalid" and "and it is called exact" in found.where
    assert check(norm, lambda x, w: norm(x * 1, w), X, W, numerics=Numerics.EXACT).status == "valid"


def test_a_norm_over_the_wrong_axis_is_invalid():
    assert check(norm, norm_over_the_wrong_axis, X, W).status == "invalid"
    square = array(16, 16)  # where both axes have one size, shapes alone would not tell
    assert check(norm, norm_over_the_wrong_axis, square, array(16)).status == "invalid"


def test_an_error_of_a_millionth_in_the_last_element_alone_is_found():
    found = check(norm, wrong_in_the_last_element, X, W)
    assert found.status == "invalid" and "[2, 15, 63]" in found.where
    assert 1e-7 < found.error < 1e-5


def test_an_approximate_rewrite_is_held_to_its_budget_with_its_rounding():
    rounded = lambda x, w: norm(x.astype(jnp.bfloat16).astype(jnp.float32), w)
    error = check(norm, rounded, X, W, numerics=Numerics.APPROXIMATE, budget=1e-2).error
    assert 1e-4 < error < 1e-2
    assert check(norm, rounded, X, W, numerics=Numerics.APPROXIMATE, budget=1e-4).status == "invalid"


@pytest.mark.parametrize(("numerics", "budget"), [(Numerics.APPROXIMATE, None), (Numerics.EXACT, 1e-3)])
def test_only_an_approximate_rewrite_states_a_budget(numerics, budget):
    with pytest.raises(ValueError, match="states its budget"):
        check(norm, norm, X, W, numerics=numerics, budget=budget)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_reference_is_float64_whatever_the_dtypes(dtype):
    """Casts, constants, products' result types and operations of ours are all wide, and nothing outside is."""

    def lost_in_narrow(x):
        product = jnp.dot(x, x, preferred_element_type=jnp.float32)
        return ((x.astype(jnp.float32) + 1e-9) - x.astype(jnp.float32)).astype(dtype), product, cast_inside_p.bind(x)

    graph = read(lost_in_narrow, array(5, 5, dtype=dtype))
    (x,) = random_arguments(graph, 0)
    small, product, ours = Reference(expand(graph))([x])
    assert {out.dtype for out in (small, product, ours)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(small, 1e-9, rtol=1e-6)
    np.testing.assert_allclose(product, x @ x, rtol=1e-13)
    np.testing.assert_allclose(ours, np.float64(np.float32(1e-5)), rtol=1e-9)
    assert jnp.ones(1).dtype == jnp.float32


def cast_inside(x):
    wide = x.astype(jnp.float32)
    return (((wide + 1e-5) - wide).astype(x.dtype),)


cast_inside_p = compat.make_primitive(
    "cast_inside_in_tests", lambda x: cast_inside(x)[0], lambda x: x, multiple_results=False
)


def test_operations_of_ours_are_compared_by_their_meaning_in_float64():
    assert check(lambda x: cast_inside_p.bind(x), lambda x: x * 0.0 + 1e-5, array(5)).status == "valid"
    assert check(lambda x: cast_inside_p.bind(x), lambda x: x * 0.0 + 1.001e-5, array(5)).status == "invalid"


def test_scatters_run_wide():
    graph = read(lambda x: x.at[1].add(1e-9).at[2].multiply(2.0).at[0].min(5.0), array(4))
    (x,) = random_arguments(graph, 0)
    (out,) = Reference(graph)([x])
    np.testing.assert_allclose(out[1] - x[1], 1e-9, rtol=1e-6)


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 8.0
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e9), -1), v)


def attention_rearranged(q, k, v, reach=10**6):
    scores = jnp.einsum("btnh,bsnh->bnts", q * 0.125, k)
    index = jnp.arange(scores.shape[-1])
    is_seen = (index[:, None] >= index) & (index[:, None] - index < reach)
    weights = jnp.exp(jnp.where(is_seen, scores, -1e9))
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return out / jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]


def test_a_large_rewrite_is_tried_in_a_smaller_configuration():
    q = array(1, 2048, 12, 64)
    before, after = read(attention, q, q, q), read(attention_rearranged, q, q, q)
    assert graph_cost(before).flops > 10e9
    found = validate(before, after, Numerics.REASSOCIATES)
    assert found.status == "valid"
    wrong = read(lambda q, k, v: attention_rearranged(q, k, v, reach=30), q, q, q)
    assert validate(before, wrong, Numerics.REASSOCIATES).status == "invalid"


def test_what_is_made_smaller_keeps_dimensions_that_constants_or_slices_speak_of():
    def merged(x, a, b):
        both = jnp.einsum("td,df->tf", norm(x, jnp.ones(96)), jnp.concatenate([a, b], 1))
        return both[:, :200], both[:, 200:]

    args = array(4096, 96), array(96, 200), array(96, 56)
    graph = read(merged, *args)
    small, _ = shrink(graph, graph, lambda a, b: graph_cost(a).flops < 1e7)
    assert small.inputs[0].shape[0] < 4096 and small.inputs[0].shape[1] == 96
    assert [v.shape[1] for v in small.inputs[1:]] == [200, 56]
    assert np.isfinite(run(small, *random_arguments(small, 0))[0]).all()


def test_what_cannot_be_made_smaller_is_unvalidated():
    fixed = lambda x: jnp.concatenate([x, x], 0).reshape(-1) * 1.0
    graph = read(fixed, array(1 << 13, 1 << 13))
    with pytest.raises(CannotShrink, match="cannot be made smaller"):
        shrink(graph, graph, lambda a, b: False)
    found = validate(graph, graph, Numerics.EXACT)
    assert found.status == "unvalidated" and "cannot be made smaller" in found.where


def test_reshapes_are_split_into_the_smallest_groups():
    assert list(regroup((2, 3, 4), (2, 1, 12))) == [([0], [0]), ([1, 2], [2])]
    assert list(regroup((6, 5, 1), (2, 3, 5))) == [([0], [0, 1]), ([1], [2])]


def callback(x):
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize(
    ("fn", "arg", "reason"),
    [
        (lambda key: jax.random.normal(key, (3,)), jax.eval_shape(lambda: jax.random.key(0)), "PRNG keys"),
        (callback, array(3), "pure_callback"),
        (lambda x: lax.bitcast_convert_type(x, jnp.int32), array(3), "the bits of a float"),
        (lambda x: x * jnp.nan, array(3), "gives no number"),
    ],
)
def test_what_has_no_numbers_to_compare_is_unvalidated(fn, arg, reason):
    found = check(fn, fn, arg)
    assert found.status == "unvalidated" and reason in found.where and found.error is None


def test_another_signature_is_invalid():
    found = check(lambda x: x, lambda x: x.astype(jnp.bfloat16), array(3))
    assert found.status == "invalid" and "became" in found.where


def test_integers_index_inside_their_arrays_and_data_takes_every_value():
    def look_up(table, ids, data, positions):
        return table[ids % 1000], data.astype(jnp.float32), jnp.where(positions < 3, 1, 0)

    graph = read(
        look_up, array(7, 2), array(5, dtype=jnp.int32), array(4096, dtype=jnp.int8), array(9, dtype=jnp.int32)
    )
    for trial in range(NUM_TRIALS):
        _, ids, data, positions = random_arguments(graph, trial)
        assert ids.min() >= 0 and ids.max() < 7
        assert data.min() == -128 and data.max() == 127
        assert positions.min() >= 0 and (trial or (np.diff(positions) == 1).all())


def test_operands_of_one_shape_are_drawn_independently():
    assert check(lambda x, y: x @ y, lambda x, y: y @ x, array(4, 4), array(4, 4)).status == "invalid"


def test_errors_beside_a_large_fill_count():
    want = np.array([1.0, -1e9, 2.0])
    assert relative_error(want, want + np.array([1e-3, 0, 0]))[0] > 1e-4
    error, index = relative_error(want, np.array([1.0, -1e9, np.nan]))
    assert error == np.inf and index == (2,)
    assert relative_error(np.array([np.nan, -np.inf]), np.array([0.0, -np.inf]))[0] == 0


# ------------------------------------------------------------------------------------------------- in the manager
def planted(after, numerics=Numerics.REASSOCIATES, name="fuse_norm"):
    """A pass that puts `after` in place of the whole graph, and says so."""

    def function(graph: Graph) -> PassResult:
        before, new = read(norm, X, W), read(after, X, W)
        new.replace(dict(zip(new.inputs, graph.inputs, strict=True)))
        graph.ops, graph.outputs = new.ops, new.outputs
        return PassResult(1, (), (Rewrite(name, numerics, before, read(after, X, W)),))

    return Pass(name, function, numerics)


def manager(*entries, **options):
    return PassManager(entries, PassOptions(**options))


@pytest.mark.parametrize("wrong", [norm_over_the_wrong_axis, wrong_in_the_last_element])
def test_an_invalid_rewrite_ends_the_compile_and_is_named(wrong):
    with pytest.raises(InvalidRewrite, match="rewrite fuse_norm of pass fuse_norm is invalid: output 0 at"):
        manager(planted(wrong)).run(read(norm, X, W))
    manager(planted(wrong), is_validating=False).run(read(norm, X, W))


def test_a_skipped_pass_leaves_the_graph_as_it_was():
    graph = read(norm, X, W)
    inputs, ops = graph.inputs, names(graph)
    good = planted(norm_rearranged, name="good")
    first, second = manager(planted(wrong_in_the_last_element), good, on_invalid="skip").run(graph)
    assert first.result.matched == 0 and first.ops_after == first.ops_before == sum(ops.values())
    (remark,) = first.result.remarks
    assert "left out: rewrite fuse_norm" in str(remark)
    assert second.result.matched == 1 and [v.status for v in second.validations] == ["valid"]
    assert graph.inputs is inputs
    x = [np.asarray(x, np.float32) for x in random_arguments(graph, 0)]
    np.testing.assert_allclose(run(graph, *x)[0], norm(*map(jnp.asarray, x)), rtol=1e-5)


def test_each_distinct_rewrite_is_validated_once():
    validator = Validator()
    make = lambda fn, *args: Rewrite("rule", Numerics.REASSOCIATES, read(norm, *args), read(fn, *args))
    first = validator.check(make(norm_rearranged, X, W))
    again = validator.check(make(norm_rearranged, X, W))
    assert first.seconds > 0 and again.seconds == 0 and (first.status, first.error) == (again.status, again.error)
    assert validator.check(make(norm_rearranged, array(4, 16, 64), W)).seconds > 0
    other_constant = lambda x, w: norm_rearranged(x, w) * 2
    assert validator.check(make(other_constant, X, W)).status == "invalid"


def test_validation_works_while_the_program_is_traced():
    registry = make_registry([planted(norm_rearranged)])
    args = [jnp.asarray(x, jnp.float32) for x in random_arguments(read(norm, X, W), 0)]
    rewritten = passes.apply(norm, "fuse_norm", registry=registry)
    np.testing.assert_allclose(jax.jit(rewritten)(*args), norm(*args), rtol=1e-5)
    wrong = passes.apply(norm, "fuse_norm", registry=make_registry([planted(norm_over_the_wrong_axis)]))
    with pytest.raises(InvalidRewrite):
        jax.grad(lambda x: wrong(x, args[1]).sum())(args[0])


# ------------------------------------------------------------------------------------------------- bisection
def drop_products(graph: Graph, counter: RewriteCounter) -> PassResult:
    """Takes the first factor for each product, for as long as it may."""
    count = 0
    for op in [op for op in graph.ops if op.name == "mul"]:
        if not counter.allows("drop_product", op.source):
            break
        graph.replace({op.result: op.operands[0]})
        count += 1
    return PassResult(count)


def test_bisection_counts_rewrites_of_passes_that_ask_and_other_passes_as_one():
    program = lambda x: x * 2.0 * 3.0 * 4.0 + 1.0
    registry = make_registry([Pass("drop", drop_products, Numerics.APPROXIMATE, is_counted=True), *passes_of("dce")])
    pipeline = parse_pipeline("dce,drop,dce", registry)
    for limit, (runs, matched) in {0: (0, 0), 1: (1, 0), 2: (2, 1), 4: (2, 3), 5: (3, 3)}.items():
        texts = []
        graph = read(program, array(4))
        statistics = PassManager(pipeline, PassOptions(bisect_limit=limit), texts.append).run(graph)
        assert len(statistics) == runs
        assert sum(s.result.matched for s in statistics if s.name == "drop") == matched
        if limit == 2:
            assert texts[0].startswith("bisect: 2 rewrites made, the last is drop_product at test_validation.py:")
    assert matched == 3


def passes_of(*names):
    return [parse_pipeline(name)[0] for name in names]
