"""One contract for every implementation of attention, over named shapes, against float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.kernels.attention import attention, attention_per_head, pallas_tpu, reference, xla_blocked
from fastgpt_jax.kernels.attention.shapes import KEY_SEGMENTS, SHAPES, SLOPES, NamedShape
from fastgpt_jax.kernels.attention.spec import AttentionSpec, check, times
from fastgpt_jax.kernels.cpu import attention as cpu
from fastgpt_jax.kernels.cpu import library
from passes.block_lists import block_list
from passes.masks import All, BlockTable, KeyRange, Mask, PerHead, Read, Segment, Shifted, causal, window
from passes.reader import trace
from passes.replay import Widening, evaluate
from passes.scores import Alibi, Score
from tests.kernels.attention_inputs import assert_close, float64_result, make_inputs

QUICK = {"causal, odd lengths", "everything", "behind what is cached, window"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
IMPLEMENTATIONS = [
    pytest.param("reference", marks=pytest.mark.slow),
    "xla_blocked",
    "pallas_tpu",
    pytest.param("cpu", marks=pytest.mark.skipif(library.find() is None, reason="the native kernels are not built")),
]


def run(implementation: str, spec: AttentionSpec, shape: NamedShape, inputs) -> tuple[jax.Array, jax.Array]:
    if implementation == "reference":
        fn = functools.partial(reference.attend, spec)
    elif implementation == "xla_blocked":
        fn = functools.partial(xla_blocked.attend, spec, block_q=16, block_k=32)
    elif implementation == "cpu":
        fn = functools.partial(cpu.attend, spec)
    else:
        fn = functools.partial(pallas_tpu.attend, spec, block_q=shape.block_q, block_k=shape.block_k, interpret=True)
    return jax.jit(fn)(*jax.tree.map(jnp.asarray, inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_computes_attention(name, implementation, strict_jax):
    shape = SHAPES[name]
    out, lse = run(implementation, shape.spec, shape, make_inputs(shape))
    assert out.dtype == shape.dtype and lse.dtype == "float32"
    assert_close(name, (out, lse))


@pytest.mark.parametrize(
    "name", [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_the_kernel_lowers_for_tpus(name):
    """What the interpreter runs and the TPU dialect cannot say is found without a TPU."""
    shape = SHAPES[name]
    fn = functools.partial(pallas_tpu.attend, shape.spec, block_q=shape.block_q, block_k=shape.block_k)
    inputs = jax.tree.map(jnp.asarray, make_inputs(shape))
    lowered = jax.jit(fn).trace(*inputs).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_the_shapes_reach_every_kind_of_block():
    kinds = {"full": 0, "partial": 0, "empty": 0, "rows without keys": 0, "edges": 0}
    for shape in SHAPES.values():
        blocks = block_list(shape.mask, shape.T, shape.S, shape.block_q, shape.block_k)
        kinds["full"] += blocks.num_full
        kinds["partial"] += blocks.num_partial
        kinds["empty"] += blocks.num_query_blocks * blocks.num_key_blocks - blocks.num_visited
        kinds["rows without keys"] += int((np.diff(blocks.row_starts) == 0).sum())
        kinds["edges"] += shape.T % shape.block_q > 0 and shape.S % shape.block_k > 0
    assert min(kinds.values()) >= 5, kinds


def test_a_query_that_sees_nothing_gets_zeros_and_the_log_of_its_sink():
    out, lse = float64_result("nothing visible, sinks")
    shape = SHAPES["nothing visible, sinks"]
    np.testing.assert_array_equal(out[:, :100], 0)
    np.testing.assert_allclose(lse[:, :, :100], np.broadcast_to(make_inputs(shape).sinks[:, None], (2, 4, 100)))
    assert np.abs(out[:, 100:]).min() > 0
    out, lse = float64_result("nothing visible")
    assert (out == 0).all() and (lse == -np.inf).all()


@dataclasses.dataclass(frozen=True)
class OffByOne(Mask):
    """A mask whose partial blocks are evaluated one key too far; what it says of blocks is right."""

    mask: Mask

    @property
    def reads(self):
        return self.mask.reads

    def evaluate(self, q, k, look):
        return self.mask.evaluate(q, k - 1, look)

    def block(self, q0, q1, k0, k1, look=None):
        return self.mask.block(q0, q1, k0, k1, look)


@pytest.mark.parametrize("implementation", [pytest.param("xla_blocked", marks=pytest.mark.slow), "pallas_tpu"])
@pytest.mark.parametrize(
    "name",
    [
        "causal, odd lengths",
        pytest.param("window", marks=pytest.mark.slow),
        pytest.param("prefix", marks=pytest.mark.slow),
    ],
)
def test_the_contract_catches_partial_blocks_that_are_off_by_one(name, implementation):
    shape = SHAPES[name]
    planted = dataclasses.replace(shape.spec, mask=OffByOne(shape.mask))
    result = run(implementation, planted, shape, make_inputs(shape))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(name, result)


@dataclasses.dataclass(frozen=True)
class NeverEvaluated(Mask):
    """Everything is visible, and nobody may ask about a pair."""

    def evaluate(self, q, k, look):
        raise AssertionError("a full block evaluated the mask")

    def block(self, q0, q1, k0, k1, look=None):
        return True, True


def abstract_inputs(T: int, S: int, dtype: str = "float32", N: int = 4, K: int = 2, H: int = 16):
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in ((1, T, N, H), (1, S, K, H), (1, S, K, H)))


BLOCKED = {
    "xla_blocked": functools.partial(xla_blocked.attend, block_q=16, block_k=128),
    "pallas_tpu": functools.partial(pallas_tpu.attend, block_q=16, block_k=128, interpret=True),
}


@pytest.mark.parametrize("implementation", BLOCKED)
def test_full_blocks_evaluate_no_mask(implementation):
    spec = AttentionSpec(1.0, NeverEvaluated())
    jax.eval_shape(functools.partial(BLOCKED[implementation], spec), *abstract_inputs(32, 256))
    with pytest.raises(AssertionError, match="a full block"):
        jax.eval_shape(functools.partial(reference.attend, spec), *abstract_inputs(32, 256))


def equations(jaxpr, name: str) -> list:
    """All equations of a primitive, in calls and loops too."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == name else []
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(param, "jaxpr", param)
            found += equations(inner, name) if hasattr(inner, "eqns") and eqn.primitive.name != name else []
    return found


def test_empty_blocks_are_not_visited():
    spec = AttentionSpec(1.0, causal() & (window(200) | KeyRange(0, 8)))
    blocks = block_list(spec.mask, 2048, 2048, 16, 128)
    trace = {n: jax.make_jaxpr(functools.partial(fn, spec))(*abstract_inputs(2048, 2048)) for n, fn in BLOCKED.items()}
    loops = equations(trace["xla_blocked"].jaxpr, "scan")
    assert sorted(loop.params["length"] for loop in loops) == sorted((blocks.num_full, blocks.num_partial))
    (kernel,) = equations(trace["pallas_tpu"].jaxpr, "pallas_call")
    assert kernel.params["grid_mapping"].grid == (1, 2, blocks.num_visited)
    assert blocks.num_visited < 0.25 * blocks.num_query_blocks * blocks.num_key_blocks


@pytest.mark.parametrize("start", [0, 250])
def test_the_loop_ends_where_a_request_does(start):
    """Keys past what a request holds may be NaN: the blocks they lie in are never read."""
    shape = NamedShape(Shifted(causal(), 0), B=2, T=32, S=300)
    inputs = make_inputs(shape)
    end = -(-(start + shape.T) // 32) * 32  # of the last block that is visited
    key, value = (np.where(np.arange(shape.S)[None, :, None, None] < end, x, np.nan) for x in inputs[1:3])
    starts = [np.full(2, start, np.int32)]
    run_with = functools.partial(xla_blocked.attend, shape.spec, block_q=16, block_k=32)
    out, _ = jax.jit(run_with)(inputs.query, jnp.asarray(key), jnp.asarray(value), starts)
    want, _ = jax.jit(functools.partial(reference.attend, shape.spec))(*inputs[:3], starts)
    np.testing.assert_allclose(out, want, rtol=0, atol=5e-6)


@dataclasses.dataclass(frozen=True)
class Table(Score):
    """A bias for each query, head and key, or for each head and key."""

    read: Read

    @property
    def reads(self):
        return (self.read,)

    def evaluate(self, scores, head, q, k, look):
        return scores + look(self.read)


@pytest.mark.parametrize(("by", "shape"), [("head_key", (1, 4, 50)), ("head_pair", (2, 20, 4, 50))])
def test_a_bias_may_be_an_array_by_head_and_key(by, shape):
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    inputs = make_inputs(NamedShape(causal(), T=20, S=50))
    spec = AttentionSpec(0.25, causal(), score=Table(Read(0, by)))
    out, _ = jax.jit(functools.partial(xla_blocked.attend, spec, block_q=16, block_k=16))(*inputs[:3], [bias])
    scores = 0.25 * np.einsum("btnh,bsnh->btns", inputs.query, np.repeat(inputs.key, 2, 2))
    scores += bias[:, None] if by == "head_key" else bias
    scores = np.where(np.tril(np.ones((20, 50), bool))[:, None], scores, -np.inf)
    weights = np.asarray(jax.nn.softmax(scores, -1))
    want = np.einsum("btns,bsnh->btnh", weights, np.repeat(inputs.value, 2, 2))
    np.testing.assert_allclose(out, want, rtol=0, atol=5e-6)


def test_what_the_kernel_holds_does_not_grow_with_the_length():
    def held_bytes(length: int) -> int:
        fn = functools.partial(BLOCKED["pallas_tpu"], AttentionSpec(1.0, causal()))
        (kernel,) = equations(jax.make_jaxpr(fn)(*abstract_inputs(length, length)).jaxpr, "pallas_call")
        refs = [v.aval for v in kernel.params["jaxpr"].invars[3:]]  # after the block list, which scalar memory holds
        return sum(int(np.prod(ref.shape)) * ref.dtype.itemsize for ref in refs)

    assert held_bytes(512) == held_bytes(2048) == held_bytes(4096) > 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "gradients"])
def test_memory_of_the_blocked_attention_grows_linearly(what):
    def temporary_bytes(length: int) -> int:
        def forward(q, k, v):
            return attention(AttentionSpec(0.125, causal()), q, k, v, implementation="xla_blocked")[0]

        fn = forward if what == "forward" else jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2))
        inputs = abstract_inputs(length, length, N=2, K=1, H=64)
        return jax.jit(fn).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    lengths = (512, 2048, 8192, 32768)
    per_token = [temporary_bytes(n) / n for n in lengths]
    # A score matrix would take 4 bytes times the length for each token and head.
    assert per_token[-1] <= 1.05 * per_token[0] and max(per_token) < 64 * 1024 and min(per_token) > 0, per_token


def loss(fn, weights, inputs):
    out, lse = fn(*inputs)
    return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse) * weights[1])


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "causal",
                "window and sinks",
                "nothing visible, sinks",
                "lengths",
                "ALiBi",
                "soft-cap",
                "flags",
            )
        ],
        *[pytest.param(name, marks=pytest.mark.slow) for name in ("causal, more queries than keys", "multi-query")],
    ],
)
def test_gradients_are_those_of_the_reference(name):
    shape = SHAPES[name]
    query, key, value, leaves, sinks = jax.tree.map(jnp.asarray, make_inputs(shape, garbage=False))
    rng = np.random.default_rng(5)
    weights = (
        rng.standard_normal((shape.B, shape.T, shape.N, shape.E)),
        rng.standard_normal((shape.B, shape.N, shape.T)),
    )
    weights = [jnp.asarray(w, jnp.float32) for w in weights]

    def gradients(attend):
        def of(query, key, value, slopes, sinks):
            return loss(
                functools.partial(attend, shape.spec),
                weights,
                (query, key, value, [*leaves[:SLOPES], slopes, *leaves[SLOPES + 1 :]], sinks),
            )

        wrt = (0, 1, 2, 3, 4) if sinks is not None else (0, 1, 2, 3)
        return jax.jit(jax.grad(of, wrt))(query, key, value, leaves[SLOPES], sinks)

    ours = gradients(functools.partial(attention, implementation="xla_blocked"))
    theirs = gradients(reference.attend)
    for which, got, want in zip(("query", "key", "value", "slopes", "sinks"), ours, theirs, strict=False):
        # float32 sums of some hundred terms, in parts of the largest.
        scale = max(1.0, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=3e-6, err_msg=which)
        assert np.abs(want).max() > 0 or which == "slopes"


def test_gradients_do_not_see_keys_past_the_length():
    shape = dataclasses.replace(SHAPES["lengths"], T=9, S=70)
    inputs = jax.tree.map(jnp.asarray, make_inputs(shape))
    assert np.isnan(inputs.key).any()

    def of(query, key, value):
        return attention(shape.spec, query, key, value, inputs.leaves)[0].sum()

    for gradient in jax.jit(jax.grad(of, (0, 1, 2)))(*inputs[:3]):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.slow
def test_masks_may_differ_between_heads():
    shape = NamedShape(All(), B=1, T=30, S=30, N=6, K=2, has_sinks=True, alibi=True)
    inputs = jax.tree.map(jnp.asarray, make_inputs(shape))
    masks = PerHead((window(4), causal(), window(4), causal(), causal(), causal()))
    got = jax.jit(functools.partial(attention_per_head, shape.spec, masks, implementation="reference"))(*inputs)
    for mask, heads in masks.heads.items():
        spec = dataclasses.replace(shape.spec, mask=mask)
        out, lse = jax.jit(functools.partial(reference.attend, spec))(*inputs)
        np.testing.assert_allclose(got[0][:, :, heads], out[:, :, heads], rtol=0, atol=2e-6)
        np.testing.assert_allclose(got[1][:, heads], lse[:, heads], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="each of the 6 query heads is needed, got 2"):
        attention_per_head(shape.spec, PerHead((causal(), causal())), *inputs)


class Odd(Score):
    def evaluate(self, scores, head, q, k, look):
        return scores


@pytest.mark.parametrize(
    ("implementation", "spec", "options", "dtype", "reason"),
    [
        (pallas_tpu, AttentionSpec(1.0), {"block_k": 64}, "float32", "block_k one of 128"),
        (pallas_tpu, AttentionSpec(1.0), {"block_q": 8}, "bfloat16", "block_q must be a multiple of 16"),
        (pallas_tpu, AttentionSpec(1.0), {"block_q": 2048}, "float32", "at most 2048 rows"),
        (pallas_tpu, AttentionSpec(1.0), {}, "float16", "all be float32 or all bfloat16, got float16"),
        (pallas_tpu, AttentionSpec(1.0, score=Odd()), {}, "float32", "ALiBi only, got Odd"),
        (pallas_tpu, AttentionSpec(1.0, BlockTable(0, 16, 64)), {}, "float32", "block_k one of 128"),
        (pallas_tpu, AttentionSpec(1.0, BlockTable(0, 16, 128)), {"block_q": 32}, "float32", "multiples of 32 by 128"),
        (xla_blocked, AttentionSpec(1.0), {}, "float64", "computes in float32, and the inputs are float64"),
    ],
)
def test_an_implementation_says_why_it_declines(implementation, spec, options, dtype, reason):
    with jax.enable_x64(True):
        inputs = abstract_inputs(64, 256, dtype)
    assert reason in implementation.supports(spec, *inputs, **options)


def test_a_block_list_that_scalar_memory_cannot_hold_is_declined():
    spec, inputs = AttentionSpec(1.0, causal()), abstract_inputs(2**16, 2**16)
    assert "larger blocks" in pallas_tpu.supports(spec, *inputs, block_q=128, block_k=128)
    assert pallas_tpu.supports(spec, *inputs) is None
    with pytest.raises(NotImplementedError, match="the Pallas TPU kernel declines: .* larger blocks"):
        jax.eval_shape(functools.partial(pallas_tpu.attend, spec, block_q=128, block_k=128), *inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": 3}, "query heads must be a multiple of KV heads, got N=4 and K=3"),
        ({"T": 0}, "a query and a key at least, got T=0"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    shape = dataclasses.replace(SHAPES["causal"], **changes)
    inputs = jax.tree.map(jnp.asarray, make_inputs(shape))
    with pytest.raises(ValueError, match=message):
        attention(shape.spec, *inputs)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.zeros((2, 159), jnp.int32), "leaf 2 must hold 160 elements by"),
        (jnp.zeros((3, 160), jnp.int32), "the first of 1 or 2 requests"),
        (jnp.zeros((160,), jnp.int32), "must have 2 axes"),
    ],
)
def test_leaves_that_do_not_fit_are_refused(leaf, message):
    shape = SHAPES["packed segments"]
    query, key, value, leaves, sinks = jax.tree.map(jnp.asarray, make_inputs(shape))
    leaves[KEY_SEGMENTS] = leaf
    with pytest.raises(ValueError, match=message):
        attention(shape.spec, query, key, value, leaves, sinks)
    with pytest.raises(ValueError, match="reads leaf 9, and there are 8 leaves"):
        attention(AttentionSpec(1.0, Segment(9, 9)), query, key, value, leaves, sinks)


@pytest.mark.parametrize(
    ("sinks", "slopes", "message"),
    [
        (jnp.zeros(3), jnp.zeros((1, 4)), "one number for each of the 4 query heads, got .3,"),
        (jnp.zeros(4), jnp.zeros((1, 3)), "leaf 0 must hold 4 elements by head, got .1, 3"),
        (jnp.zeros(4), jnp.zeros((3, 4)), "the first of 1 or 1 requests, got .3, 4"),
    ],
)
def test_numbers_for_heads_that_do_not_fit_are_refused(sinks, slopes, message):
    with pytest.raises(ValueError, match=message):
        check(AttentionSpec(1.0, score=Alibi(0)), *abstract_inputs(8, 8), [slopes], sinks)


def test_an_unknown_implementation_lists_the_known_ones():
    with pytest.raises(ValueError, match="pallas_tpu, xla_blocked, reference, cpu or None, got 'cudnn'"):
        attention(AttentionSpec(1.0), *(jnp.zeros(x.shape) for x in abstract_inputs(4, 4)), implementation="cudnn")


@pytest.mark.parametrize("factor", [0.25, float(np.float32(0.1)), 1 / 97.9795913696289, 0.1, 20 / 97.9795913696289])
def test_a_number_that_float32_does_not_hold_is_multiplied_to_more_digits(factor):
    x = np.linspace(-3, 3, 7)
    with jax.enable_x64(True):
        graph, _ = trace(lambda x: times(x, factor), jax.ShapeDtypeStruct((7,), np.float32))
        (found,) = evaluate(graph, [jnp.asarray(x)], Widening(jnp.float64))
        np.testing.assert_allclose(np.asarray(found), x * factor, rtol=1e-13)
