"""Every spelling becomes one operation and computes what it did; what only looks like one is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.manager import PassManager, PassOptions
from passes.registry import parse_pipeline
from passes.replay import evaluate
from passes.simplify import simplify
from tests.passes.fusion import spellings as s
from tests.passes.graphs import names, read

NORM, ROPE, GATE = (s.X, s.W, s.B), (s.HEADS, s.ANGLES), (s.GATE, s.UP)
MATCHED = [
    *(("rms_norm", "rms_norm", NORM, fn, name) for name, fn in s.RMS.items()),
    *(("layer_norm", "layer_norm", NORM, fn, name) for name, fn in s.LAYER.items()),
    *(("rope", "rope", ROPE, fn, name) for name, fn in s.ROPE.items()),
    *(("gated_mlp", "gated", GATE, fn, name) for name, fn in s.GATED.items()),
]
LEFT = [
    *(("rms_norm", NORM, fn, name) for name, fn in s.NO_RMS.items()),
    *(("layer_norm", NORM, fn, name) for name, fn in s.NO_LAYER.items()),
    *(("rope", ROPE, fn, name) for name, fn in s.NO_ROPE.items()),
    *(("gated_mlp", GATE, fn, name) for name, fn in s.NO_GATE.items()),
]
DTYPES = (jnp.float32, jnp.bfloat16)


def every(spellings, *marks):
    """Test parameters; those that run slowly are only in the full suite."""
    return [pytest.param(p, o, a, f, id=f"{p}: {n}", marks=marks) for p, o, a, f, n in spellings]


def rewritten(fn, args, pipeline, *, is_validating=False):
    """The graph after a pass, its statistics, and those of a second run."""
    graph = read(fn, *args)
    simplify(graph)
    manager = PassManager(parse_pipeline(pipeline), PassOptions(is_validating=is_validating))
    return graph, manager.run(graph)[0], manager.run(graph)[0]


@pytest.mark.parametrize("name, op, args, fn", [*every(MATCHED[::3]), *every(MATCHED, pytest.mark.slow)])
def test_one_operation_that_computes_the_same(name, op, args, fn):
    graph, first, second = rewritten(fn, args, name)
    assert first.result.matched == 1 and names(graph)[op] == 1 and second.result.matched == 0
    np.testing.assert_allclose(evaluate(graph, args)[0], fn(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, op, args, fn", every(MATCHED))
def test_in_float64_nothing_differs(name, op, args, fn):
    (verdict,) = rewritten(fn, args, name, is_validating=True)[1].validations
    assert verdict.status == "valid" and verdict.error is not None and verdict.error < 1e-9


@pytest.mark.parametrize("name, args, fn", [pytest.param(p, a, f, id=f"{p}: {n}") for p, a, f, n in LEFT])
def test_near_misses_are_left(name, args, fn):
    graph, first, _ = rewritten(fn, args, name)
    assert first.result.matched == 0 and first.ops_before == first.ops_after


@pytest.mark.slow
@pytest.mark.parametrize("name, op, args, fn", every(MATCHED))
def test_narrow_and_mixed_dtypes(name, op, args, fn):
    """In bfloat16, and in float32 with casts at both ends, as models have their norms."""
    if "by hand" in str(fn):
        return
    narrow = [x.astype(jnp.bfloat16) for x in args]

    def mixed(*xs):
        return jax.tree.map(lambda y: y.astype(jnp.bfloat16), fn(*(x.astype(jnp.float32) for x in xs)))

    graph, first, _ = rewritten(mixed, narrow, name, is_validating=True)
    assert names(graph)[op] == 1 and all(v.status == "valid" for v in first.validations)
    graph, first, _ = rewritten(fn, narrow, name, is_validating=True)
    assert all(v.status == "valid" for v in first.validations)
    if name != "layer_norm":  # means of bfloat16 are made in float32 and cast in between
        assert names(graph)[op] == 1


@pytest.mark.parametrize(
    "name, fn, args, reason",
    [
        ("rms_norm", s.NO_RMS["other count"], NORM, "a division by the size of D"),
        ("rms_norm", s.NO_RMS["escapes"], NORM, "read elsewhere"),
        ("layer_norm", s.NO_LAYER["ddof"], NORM, "expected 8 again and not 7"),
        ("rope", s.NO_ROPE["product escapes"], ROPE, "read elsewhere"),
    ],
)
def test_a_miss_names_the_line_and_the_reason(name, fn, args, reason):
    _, first, _ = rewritten(fn, args, name)
    assert any(reason in str(r) and str(r).startswith("spellings.py:") for r in first.result.remarks)
