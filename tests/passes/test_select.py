"""The pass `select` over a table of toy implementations: what it chooses, what it says, and the way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import compat
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.reader import trace
from passes.registry import Pass
from passes.replay import evaluate
from passes.rewrite import RewriteCounter
from passes.select import PLAIN, Candidate, Target, choose, deselect, make_implementation, select
from passes.validation import InvalidRewrite

CPU, TPU = Target("cpu"), Target("tpu")


def _double(x, *, bias):
    return 2 * x + bias


double_p = compat.derive_rules(
    compat.make_primitive("double", _double, lambda x, bias: compat.shaped(x.shape, x.dtype), multiple_results=False)
)
summed_p = make_implementation(double_p, "summed", lambda x, *, bias: x + x + bias)
wrong_p = make_implementation(double_p, "wrong", lambda x, *, bias: x + x + bias + 1e-3)


def only(*platforms):
    return lambda op, target: None if target.platform in platforms else f"not on {target.platform}"


def cost(seconds):
    return lambda op, target: seconds if target.platform == "cpu" else None


SUMMED = Candidate("summed", summed_p, seconds=cost(1e-3))
BOUND = Candidate("bound", wrong_p, declines=only("tpu"), is_portable=False)
PLAIN_ONE = Candidate(PLAIN, seconds=cost(1.5e-3))
TABLE = {"double": (BOUND, SUMMED, PLAIN_ONE)}


def program() -> Graph:
    def fn(x):
        x = double_p.bind(x, bias=1.0)
        return jax.lax.scan(lambda c, _: (double_p.bind(c, bias=0.5), None), x, None, length=3)[0]

    return trace(fn, jnp.zeros((4,), jnp.float32))[0]


def names(graph: Graph) -> list[str]:
    return [op.name for _, op in graph.walk() if op.name.startswith("double")]


def test_the_cheapest_that_takes_it_is_chosen_in_bodies_too_and_told_with_reasons():
    graph = program()
    result = select(graph, table=TABLE, target=CPU)
    assert names(graph) == ["double.summed", "double.summed"] and result.matched == 2 and result.missed == 0
    (told,) = {note.reason for note in result.notes}
    assert told == "runs as summed, estimated 1 ms; plain would take 1.5 ms; bound declines: not on cpu"
    assert result.notes[0].source.short.startswith("test_select.py:")
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(evaluate(graph, [x])[0], 16 * x + 11.5)
    again = select(graph, table=TABLE, target=CPU)
    assert again.matched == 0 and names(graph) == ["double.summed"] * 2


def test_a_small_gain_is_not_worth_compiling():
    op = next(op for _, op in program().walk() if op.name == "double")
    slightly = Candidate("summed", summed_p, seconds=cost(1.3e-3))
    chosen, reason = choose(op, (slightly, PLAIN_ONE), CPU)
    assert chosen is PLAIN_ONE and reason == "runs as plain, estimated 1.5 ms; summed would take 1.3 ms"


def test_without_measurements_the_preferred_one_runs():
    graph = program()
    (told, _) = select(graph, table=TABLE, target=TPU).notes
    assert told.reason == "runs as bound, preferred on tpu; summed comes after it; plain comes after it"


def test_what_needs_a_platform_of_its_own_can_be_taken_back():
    graph = program()
    select(graph, table=TABLE, target=TPU)
    assert deselect(graph, TABLE) == 2 and names(graph) == ["double", "double"]
    select(graph, table=TABLE, target=CPU)
    assert deselect(graph, TABLE) == 0 and names(graph) == ["double.summed"] * 2


def test_the_plain_meaning_stays_what_it_is_where_all_others_decline():
    graph = program()
    result = select(graph, table={"double": (BOUND,)}, target=CPU)
    assert result.matched == 0 and names(graph) == ["double", "double"]
    assert result.notes[0].reason == "runs as plain; bound declines: not on cpu"


def test_a_bisection_stops_between_two_choices():
    graph = program()
    counter = RewriteCounter(limit=1)
    assert select(graph, counter, table=TABLE, target=CPU).matched == 1
    assert names(graph) == ["double.summed", "double"]


def test_a_wrong_implementation_is_caught_and_named():
    table = {"double": (Candidate("wrong", wrong_p),)}
    entry = Pass("select", lambda graph: select(graph, table=table, target=CPU), Numerics.REASSOCIATES)
    with pytest.raises(InvalidRewrite, match="double.wrong"):
        PassManager([entry], PassOptions()).run(program())


def test_a_chosen_implementation_is_differentiated_and_mapped():
    run = jax.jit(lambda x: summed_p.bind(x, bias=1.0).sum())
    assert jax.grad(run)(jnp.ones(3)).tolist() == [2, 2, 2]
    assert jax.vmap(lambda x: summed_p.bind(x, bias=1.0))(jnp.ones((2, 3))).tolist() == [[3] * 3] * 2
