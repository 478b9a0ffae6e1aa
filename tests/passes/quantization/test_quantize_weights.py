"""Which products and look-ups are quantized, which are not, and that the rewritten program is the rounded one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import passes
from passes.binding_time import split
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.ops.stored import stored
from passes.quantization import replacements
from passes.quantization.quantize_weights import decided_sites, quantize_weights
from passes.quantization.rules import QuantizationRule, default_rules, unused_rules
from passes.quantization.schemes import SCHEMES, dequantize, quantize
from passes.registry import PASSES, Pass
from passes.rewrite import RewriteCounter
from passes.simplify import simplify
from passes.transform import name_parameters
from passes.validation import Validator
from passes.verify import verify
from tests.passes.graphs import assert_same_bits, names, read, run


def normal(*shape: int, seed: int = 0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def program(fn, params, *args):
    """The simplified graph of `fn(params, *args)`, its parameters named."""
    graph = read(fn, params, *args)
    name_parameters(graph, (params, *args), (0,))
    simplify(graph)
    return graph


def quantized(fn, params, *args, scheme="w8a16", rules=None):
    """The graph after the pass, and what the pass says."""
    graph = program(fn, params, *args)
    result = quantize_weights(graph, rules or default_rules(SCHEMES[scheme]))
    verify(graph)
    return graph, result


def rounded(weight, scheme, axes):
    """A weight as it is after rounding along its contracted axes."""
    moved = jnp.moveaxis(weight.astype(jnp.float32), axes, range(-len(axes), 0))
    rows = moved.reshape(*moved.shape[: -len(axes)], -1)
    near = dequantize(*quantize(rows, SCHEMES[scheme]), SCHEMES[scheme]).reshape(moved.shape)
    return jnp.moveaxis(near, range(-len(axes), 0), axes).astype(weight.dtype)


X = normal(2, 5, 64, seed=9)
HEADS = X.reshape(2, 5, 4, 16)
LAYOUTS = {
    "plain": (lambda p, x: x @ p["w"], (64, 48), (0,), X),
    "transposed": (lambda p, x: x @ p["w"].T, (48, 64), (1,), X),
    "weight first": (lambda p, x: jnp.einsum("ok,btk->obt", p["w"], x), (48, 64), (1,), X),
    "into heads": (lambda p, x: jnp.einsum("btd,ndh->btnh", x, p["w"]), (4, 64, 8), (1,), X),
    "out of heads": (lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"]), (4, 16, 40), (0, 1), HEADS),
    "heads the other way": (lambda p, x: jnp.einsum("bthn,nhd->btd", x, p["w"]), (16, 4, 40), (0, 1), HEADS),
    "reshaped": (lambda p, x: x @ p["w"].reshape(64, -1), (64, 4, 8), (0,), X),
    "split and permuted": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x, p["w"].reshape(16, 4, 40).transpose(1, 0, 2)),
        (64, 40),
        (0,),
        HEADS,
    ),
    "experts": (lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]), (2, 64, 24), (1,), X),
    "cast": (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), (64, 48), (0,), X),
}


@pytest.mark.parametrize("scheme", ["w4a16", slow("w8a16")])
@pytest.mark.parametrize("layout", [slow(x) if x in ("plain", "reshaped", "out of heads") else x for x in LAYOUTS])
def test_every_layout_is_the_product_with_the_rounded_weight(layout, scheme):
    fn, shape, axes, x = LAYOUTS[layout]
    params = {"w": normal(*shape)}
    graph, result = quantized(fn, params, x, scheme=scheme)
    assert result.matched == 1 and not result.remarks
    assert names(graph)["quantized_dot"] == 1 and not names(graph)["dot_general"]
    (found,) = run(graph, params, x)
    want = jax.jit(fn)({"w": rounded(params["w"], scheme, axes)}, x)
    tolerance = 0.02 if layout == "cast" else 2e-6  # bfloat16, and float32 sums of 64 terms in another order
    assert found.dtype == want.dtype and found.shape == want.shape
    error = np.abs(np.asarray(found, np.float32) - np.asarray(want, np.float32)).max()
    assert error <= tolerance * np.abs(np.asarray(want, np.float32)).max()


@pytest.mark.parametrize("scheme", ["w4a16", slow("w8a16"), slow("fp8")])
def test_a_tied_table_is_stored_once_and_rows_are_dequantized(scheme):
    params, ids, x = {"embed": normal(50, 70)}, jnp.asarray([[1, 2, 49], [3, 3, 60]]), normal(2, 3, 70)
    fn = lambda p, i, x: (jnp.take(p["embed"], i, axis=0), x @ p["embed"].T)
    graph, result = quantized(fn, params, ids, x, scheme=scheme)
    assert result.matched == 2
    assert (names(graph)["dequantize"], names(graph)["quantized_dot"], names(graph)["stored"]) == (1, 1, 2)
    parts = split(graph, [True, False, False])
    assert parts.packed_bytes == SCHEMES[scheme].nbytes(50, 70)
    if scheme != "fp8":  # whose activations are rounded too
        near = {"embed": rounded(params["embed"], scheme, (1,))}
        for found, want in zip(run(graph, params, ids, x), fn(near, ids, x), strict=True):
            np.testing.assert_allclose(found, want, atol=2e-5)  # NaN for the row that the table has not, in both


@pytest.mark.parametrize("axis", [slow(0), 1, slow(2)])
def test_rows_of_any_axis_are_taken(axis):
    params, ids = {"w": normal(20, 20, 20)}, jnp.asarray([[1, 2], [7, 19]])
    fn = lambda p, i: jnp.take(p["w"], i, axis=axis)
    graph, result = quantized(fn, params, ids)
    others = tuple(d for d in range(3) if d != axis)
    assert result.matched == 1
    np.testing.assert_allclose(run(graph, params, ids)[0], fn({"w": rounded(params["w"], "w8a16", others)}, ids))


def layers(p, x):
    def body(h, layer):
        return jnp.tanh(h @ layer["up"]) @ layer["down"].T * layer["norm"], None

    return lax.scan(body, x, p)[0]


STACK = {"up": normal(3, 64, 32) / 8, "down": normal(3, 64, 32, seed=1) / 8, "norm": normal(3, 64)}


@pytest.mark.parametrize("scheme", ["w4a16", slow("w8a16")])
def test_weights_of_a_scan_are_quantized_in_a_stack(scheme):
    graph, result = quantized(layers, STACK, X, scheme=scheme)
    assert result.matched == 2
    near = {**STACK, "up": rounded(STACK["up"], scheme, (1,)), "down": rounded(STACK["down"], scheme, (2,))}
    np.testing.assert_allclose(run(graph, STACK, X)[0], jax.jit(layers)(near, X), atol=2e-6)
    # The float weights no longer reach the loop, and each layer takes its own part of the stack.
    parts = split(graph, [True] * 3 + [False])
    stored_bytes = SCHEMES[scheme].nbytes(3 * 32, 64) + SCHEMES[scheme].nbytes(3 * 64, 32)
    assert parts.packed_bytes == stored_bytes + STACK["norm"].nbytes


def test_a_weight_that_every_iteration_shares_is_stored_once():
    params = {"w": normal(64, 64) / 8}
    fn = lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]
    graph, result = quantized(fn, params, X)
    assert result.matched == 1 and names(graph)["stored"] == 2
    np.testing.assert_allclose(run(graph, params, X)[0], fn({"w": rounded(params["w"], "w8a16", (0,))}, X), atol=2e-6)


W = normal(64, 64)


def in_a_while(p, x):
    """As often as the data says, with a weight that the condition reads too."""
    rise = lambda carry: jnp.sum(carry[1] @ p["w"]) ** 2 + carry[0] < jnp.abs(x[0, 0, 0]) * 1e6
    return lax.while_loop(rise, lambda carry: (carry[0] + 1e5, jnp.tanh(carry[1] @ p["w"] @ p["v"])), (0.0, x))[1]


def in_branches(p, x):
    """One weight for both branches, one for a branch alone, in a loop over layers."""
    both = [lambda h, w: h @ w, lambda h, w: jnp.tanh(h @ w) @ p["v"], lambda h, w: h]
    body = lambda h, step: (lax.switch(step[0], both, h, step[1]), None)
    return lax.scan(body, x, (jnp.int32([0, 1, 2]), jnp.stack([p["w"], p["u"], p["w"]])))[0]


@pytest.mark.parametrize(("fn", "sites"), [(in_a_while, 3), (in_branches, 3)])
@pytest.mark.parametrize("scheme", ["w4a16", slow("w8a16")])
def test_weights_in_bodies_of_while_and_cond_are_quantized_where_they_are_stored(fn, sites, scheme):
    params = {name: normal(64, 64, seed=i) / 8 for i, name in enumerate("uvw")}
    x = X / 4
    graph, result = quantized(fn, params, x, scheme=scheme)
    verify(graph)
    assert result.matched == sites and not result.remarks
    assert not names(graph)["dot_general"] and names(graph)["quantized_dot"] == sites
    near = {name: rounded(w, scheme, (0,)) for name, w in params.items()}
    np.testing.assert_allclose(run(graph, params, x)[0], jax.jit(fn)(near, x), atol=5e-5)
    assert np.abs(np.asarray(run(graph, params, x)[0]) - jax.jit(fn)(params, x)).max() > 1e-4
    # No float weight reaches the step.
    crossing = split(graph, [True] * 3 + [False]).prepare.outputs
    assert all(v.dtype != jnp.float32 or v.size < 64 * 64 for v in crossing)
    assert quantize_weights(graph, default_rules(SCHEMES[scheme])).matched == 0


NEAR_MISSES = {
    "two activations": (lambda p, x: x @ x.transpose(0, 2, 1) + p["w"][:5, :5] * 0, None),
    "integers": (lambda p, x: x @ p["w"].astype(jnp.int8), "weight is int8"),
    "small": (lambda p, x: x[..., :8] @ p["w"][:8], "with 8 weights a channel"),
    "read as it is": (lambda p, x: x @ p["w"] + jnp.sum(x[0, 0] * p["w"]), "`mul` at"),
    "a result too": (lambda p, x: (x @ p["w"], p["w"] * 2.0), "result too"),
    "random": (lambda p, x: x @ jax.random.normal(p["key"], (64, 64)), "PRNG"),
    "made in a while": (
        lambda p, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ jnp.sin(p["w"])), c[2]), (0, x, x)
        )[1],
        "computed inside the loop",
    ),
    "a constant": (lambda p, x: x @ (jnp.ones((64, 64)) + jnp.arange(64)), "not a parameter"),
    "parts of rows": (
        lambda p, x: lax.gather(
            p["w"],
            x[0, :2, :1].astype(int) * 0,
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 32),
        ),
        "parts of rows",
    ),
    "norm": (lambda p, x: x @ p["norm"], "rule '(?i).*norm.*' for * says so"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_and_say_why(name):
    fn, reason = NEAR_MISSES[name]
    params = {"w": W, "norm": W, "key": jax.random.key(0)}
    graph = program(fn, params, X)
    before = names(graph)
    result = quantize_weights(graph, default_rules(SCHEMES["w8a16"]))
    assert result.matched == 0 and names(graph) == before
    if reason is None:
        assert not result.remarks
    else:
        (remark,) = result.remarks
        assert reason in remark.reason and "is not quantized" in remark.reason


def test_a_rule_may_keep_a_float_table_beside_the_quantized_head():
    params, ids = {"embed": normal(50, 64)}, jnp.asarray([[1, 2]])
    rules = [QuantizationRule("embed", "gather", None), QuantizationRule(".*", "*", SCHEMES["w8a16"])]
    graph, result = quantized(lambda p, i: jnp.tanh(p["embed"][i]) @ p["embed"].T, params, ids, rules=rules)
    assert result.matched == 1 and "rule 'embed' for gather says so" in result.remarks[0].reason
    # The float table crosses for the look-up, and yet nothing is quantized again in the step.
    parts = split(graph, [True, False])
    assert {v.dtype for v in parts.prepare.outputs} == {jnp.dtype("int8"), jnp.dtype("float32")}
    assert not names(parts.step)["round"]


def test_the_first_rule_that_matches_decides_and_unused_ones_are_known():
    rules = [
        QuantizationRule("up", "gather", SCHEMES["fp8"]),
        QuantizationRule("u.", "dot", SCHEMES["w4a16"]),
        QuantizationRule("up", "*", None),
        QuantizationRule("down", "*", None),
    ]
    graph = program(layers, STACK, X)
    sites = decided_sites(graph)
    assert sites == [("up", "dot"), ("down", "dot")]
    assert unused_rules(rules, sites) == [rules[0], rules[2]]
    graph, result = quantized(layers, STACK, X, rules=rules)
    assert result.matched == 1 and [
        op.params["scheme"].name for _, op in graph.walk() if op.name == "quantized_dot"
    ] == ["w4a16"]


def test_merged_weights_need_rules_that_agree():
    params = {"q": normal(64, 8), "k": normal(64, 8, seed=1), "scale": normal(64)}
    fn = lambda p, x: x @ (jnp.concatenate([p["q"], p["k"]], 1) * p["scale"][:, None])
    assert quantized(fn, params, X)[1].matched == 1
    rules = [QuantizationRule("q", "*", None), *default_rules(SCHEMES["w8a16"])]
    result = quantized(fn, params, X, rules=rules)[1]
    assert result.matched == 0 and "rules differ" in result.remarks[0].reason


@pytest.mark.parametrize("scheme", ["w4a16", *map(slow, ["w8a16", "w8a8", "w4a8", "fp8"])])
def test_a_second_run_changes_nothing(scheme):
    params = {"embed": normal(50, 64), "w": normal(64, 64), "layers": STACK}
    fn = lambda p, i: layers(p["layers"], p["embed"][i] @ p["w"]) @ p["embed"].T
    graph, result = quantized(fn, params, jnp.asarray([[1, 2, 3]]), scheme=scheme)
    assert result.matched == 5
    before = names(graph)
    again = quantize_weights(graph, default_rules(SCHEMES[scheme]))
    assert (again.matched, again.remarks, names(graph)) == (0, (), before)


def test_a_bisection_stops_between_two_weights():
    graph = program(layers, STACK, X)
    result = quantize_weights(graph, default_rules(SCHEMES["w8a16"]), RewriteCounter(limit=1))
    assert result.matched == 1 and names(graph)["dot_general"] == 1


def test_each_distinct_product_is_validated_and_a_wrong_one_is_caught(monkeypatch):
    rules = default_rules(SCHEMES["w8a16"])
    validator = Validator()
    result = quantize_weights(program(LAYOUTS["into heads"][0], {"w": normal(4, 64, 8)}, X), rules)
    (rewrite,) = result.rewrites
    assert rewrite.numerics is Numerics.APPROXIMATE and rewrite.budget == SCHEMES["w8a16"].budget
    assert validator.check(rewrite).status == "valid"
    order = replacements.in_root_order
    monkeypatch.setattr(replacements, "in_root_order", lambda view, part: order(view, part)[::-1])
    result = quantize_weights(program(LAYOUTS["into heads"][0], {"w": normal(4, 64, 8)}, X), rules)
    assert validator.check(result.rewrites[0]).status == "invalid"


@pytest.mark.parametrize("scheme", ["w8a8", *map(slow, ["w8a16", "w4a16", "w4a8", "fp8"])])
def test_gradients_through_the_pass_reach_every_weight(scheme):
    entry = Pass(
        "quantize",
        lambda graph: quantize_weights(graph, default_rules(SCHEMES[scheme]), is_trainable=True),
        Numerics.APPROXIMATE,
    )
    params = {"embed": normal(50, 64), "layers": STACK}

    def loss(p, ids):
        return jnp.mean((layers(p["layers"], p["embed"][ids]) @ p["embed"].T) ** 2)

    options = PassOptions(is_validating=False)
    fn = passes.apply(loss, "simplify,quantize,simplify", registry={**PASSES, "quantize": entry}, options=options)
    ids = jnp.asarray([[1, 2, 3]])
    found, want = jax.jit(jax.grad(fn))(params, ids), jax.jit(jax.grad(loss))(params, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all() and np.any(np.asarray(a))
        assert np.vdot(a, b) > 0.8 * np.linalg.norm(a) * np.linalg.norm(b)


def test_what_is_stored_is_kept_even_where_the_original_is_smaller_or_crosses_anyway():
    def fn(w, x):
        wide = stored(jnp.concatenate([w, w], axis=1))
        return x @ wide, x @ w

    graph = read(fn, W, X)
    parts = split(graph, [True, False])
    assert parts.packed_bytes == 3 * W.nbytes and not names(parts.step)["concatenate"]
    assert_same_bits(run(parts.step, run(parts.prepare, W), X), jax.jit(fn)(W, X))


def test_the_pass_is_one_of_a_pipeline():
    entry = Pass("q", lambda graph: quantize_weights(graph, default_rules(SCHEMES["w8a16"])), Numerics.APPROXIMATE)
    (statistics,) = PassManager([entry], PassOptions(is_validating=False)).run(program(layers, STACK, X))
    assert statistics.result.matched == 2 and statistics.numerics is Numerics.APPROXIMATE
