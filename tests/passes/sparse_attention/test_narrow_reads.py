"""`narrow_reads`: what a step reads of its caches, and that it computes what it did, wherever requests stand."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from passes import compat
from passes.attention.rewrite import attention
from passes.extract import clone
from passes.random_inputs import NUM_TRIALS, narrow, random_arguments
from passes.reader import trace
from passes.replay import evaluate
from passes.simplify import simplify
from passes.sparse_attention.narrow_reads import narrow_reads
from passes.sparse_attention.support import find_support
from passes.validation import validate
from passes.verify import verify
from tests.passes.sparse_attention.steps import Step, valid_rows

WINDOW = 5


def window(q, k):
    return q - k < WINDOW


def window_and_sinks(q, k):
    return (q - k < WINDOW) | (k < 2)


def full(q, k):
    return k >= 0


def both(step, args, expect=True):
    """The step before and after the pass, compiled, and what the pass said."""
    graph, tree = trace(step, *args)
    simplify(graph)
    assert attention(graph).matched
    simplify(graph)
    before = clone(graph)
    result = narrow_reads(graph)
    verify(graph)
    assert bool(result.matched) == expect
    simplify(graph)
    assert not narrow_reads(graph).matched

    def compiled(graph):
        return compat.quick_jit(lambda *leaves: jax.tree.unflatten(tree, evaluate(graph, leaves)))

    return compiled(before), compiled(graph), graph, result


def reads(graph):
    """Rows read by each operation that reads caches, all heads of a row one."""
    return [op.results[0].shape[1] for _, op in graph.walk() if op.name == "kv_update_read"]


def assert_same_step(before, after, args):
    leaves = jax.tree.leaves(args)
    counts = args[3]
    (wanted, old), (found, new) = before(*leaves), after(*leaves)
    np.testing.assert_allclose(valid_rows(found, counts), valid_rows(wanted, counts), rtol=2e-5, atol=2e-5)
    assert np.isfinite(valid_rows(found, counts)).all()
    # Rows that a later layer wrote come from sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), new, old)


STEPS = {
    "window": (Step(window), 1, WINDOW),
    "window and sinks": (Step(window_and_sinks), 1, WINDOW + 2),
    "window, chunk": (Step(window), 4, WINDOW + 3),
    "window and sinks, chunk": (Step(window_and_sinks), 4, WINDOW + 3 + 2),
    "int8": (Step(window_and_sinks, is_int8=True), 1, WINDOW + 2),
    "bias and rotation": (Step(window_and_sinks, bias=True), 4, WINDOW + 3 + 2),
    "loop": (Step(window_and_sinks, num_layers=2, in_loop=True), 4, WINDOW + 3 + 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_rows_read_and_tokens_computed(name):
    step, T, num_rows = STEPS[name]
    args = step.arguments(T, [0, 3, 20], [T, T, 0])
    before, after, graph, result = both(step, args)
    # Row 0 stands for rows that nothing wrote: read before the window where no sink is it.
    extra = 0 if "sinks" in name or num_rows > WINDOW + 3 or name in ("int8", "loop") else 1
    assert set(reads(graph)) == {num_rows + extra}
    assert f"{num_rows} of 32 rows of keys and values are read" in str(result.notes[0])
    layers = step.num_layers if not step.in_loop else 1
    assert len(reads(graph)) == layers * (4 if step.is_int8 else 2)  # each cache written and read by one operation
    for starts, counts in (
        ([0, 3, 20], [T, T, 0]),  # an idle row
        ([0, 0, 0], [T, 1, 1]),  # all begin, two with padding
        ([32 - T, 31, 6], [T, 1, T]),  # at the end, padding beyond it
        ([WINDOW - 1, WINDOW, WINDOW + 1], [T, T, T]),  # where the window leaves the beginning
        ([1, 2, 3], [T, T, 1]),  # where it leaves the sinks
    ):
        assert_same_step(before, after, step.arguments(T, starts, counts, seed=sum(starts)))


@pytest.mark.parametrize("name", ["window and sinks", *(pytest.param(n, marks=pytest.mark.slow) for n in STEPS)])
def test_what_is_narrowed_is_validated(name):
    step, T, _ = STEPS[name]
    *_, result = both(step, step.arguments(T, [0, 3, 20], [T, T, 0]))
    assert len(result.rewrites) == result.matched
    for rewrite in result.rewrites:
        found = validate(rewrite.before, rewrite.after, rewrite.numerics)
        assert found.status == "valid", found.where
        for trial in range(NUM_TRIALS):  # positions are folded into those that there are: every query sees a key
            (out,) = evaluate(rewrite.before, narrow(random_arguments(rewrite.before, trial), rewrite.before))
            assert (np.asarray(out) != 0).all()


def test_a_row_too_few_is_invalid(monkeypatch):
    def too_few(mask):
        support = find_support(mask)
        if support is None or support.band is None:
            return support
        return dataclasses.replace(support, band=(support.band[0], support.band[1] - 1))

    monkeypatch.setattr("passes.sparse_attention.narrow_reads.find_support", too_few)
    step, T, _ = STEPS["window and sinks, chunk"]
    *_, result = both(step, step.arguments(T, [0, 3, 20], [T, T, 0]))
    (rewrite,) = result.rewrites
    assert validate(rewrite.before, rewrite.after, rewrite.numerics).status == "invalid"


@hypothesis.settings(max_examples=40, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 32), st.integers(0, 4)), min_size=3, max_size=3), st.integers(0, 2**16)
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_any_positions(chunk, places, seed):
    starts = [min(start, 32 - 1) for start, _ in places]
    counts = [min(count, chunk, 32 - start) for (_, count), start in zip(places, starts, strict=True)]
    step, before, after = _compiled(chunk)
    assert_same_step(before, after, step.arguments(chunk, starts, counts, seed=seed))


_made = {}


def _compiled(chunk):
    if chunk not in _made:
        step = Step(window_and_sinks)
        before, after, *_ = both(step, step.arguments(chunk, [0, 1, 2], [1, 1, 1]))
        _made[chunk] = step, before, after
    return _made[chunk]


def test_one_request_alone():
    step = Step(window)
    before, after, graph, _ = both(step, step.arguments(4, [9], [4]))
    assert set(reads(graph)) == {WINDOW + 3 + 1}
    for start in (0, 3, 9, 28):
        assert_same_step(before, after, step.arguments(4, [start], [4]))


def test_what_sees_everything_is_left_alone():
    step = Step(full)
    *_, graph, result = both(step, step.arguments(1, [9], [1]), expect=False)
    assert set(reads(graph)) == {32} and not result.remarks


def test_windows_that_hold_most_rows_are_left_alone_and_told():
    step = Step(lambda q, k: q - k < 28)
    *_, graph, result = both(step, step.arguments(1, [9, 3], [1, 1]), expect=False)
    assert set(reads(graph)) == {32}
    assert "28 of 32 rows are seen, too many to read them one by one" in str(result.remarks[0])


@pytest.mark.parametrize("in_loop", [False, True])
def test_no_copy_of_a_donated_pool(in_loop):
    step = Step(window, num_layers=3, in_loop=in_loop)
    args = step.arguments(1, [9, 3], [1, 1])
    _, _, graph, _ = both(step, args)
    leaves = jax.tree.leaves(args)
    run = jax.jit(lambda *leaves: evaluate(graph, leaves), donate_argnums=(0, 1))
    module = run.lower(*leaves).compile().as_text() or ""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* copy(?:-start)?\(", module)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    assert module.count("may-alias") + module.count("must-alias") >= 2
    assert all(size < leaves[0].size for size in sizes)
