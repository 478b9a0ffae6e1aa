import jax
import jax.numpy as jnp
import pytest

from passes.graph import Graph
from passes.reader import read_jaxpr
from passes.replay import evaluate, to_jaxpr
from passes.verify import verify
from tests.passes.graphs import assert_same_bits, names, read, run
from tests.passes.programs import PROGRAMS

X = jnp.sin(jnp.arange(16.0)).reshape(4, 4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_graph_computes_what_its_function_does(name):
    graph = read(PROGRAMS[name], X)
    verify(graph)
    assert_same_bits(run(graph, X), jax.jit(PROGRAMS[name])(X))


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_was_replayed_can_be_read_again(name):
    graph = read(PROGRAMS[name], X)
    again = read_jaxpr(to_jaxpr(graph))
    verify(again)
    assert [(v.shape, v.dtype) for v in again.outputs] == [(v.shape, v.dtype) for v in graph.outputs]


def test_calls_are_inlined_and_taps_survive():
    graph = read(PROGRAMS["remat"], X)
    assert names(graph) == {"dot_general": 1, "name": 1, "sin": 1}
    assert not names(read(PROGRAMS["custom_jvp"], X)).keys() & {"jit", "pjit", "custom_jvp_call"}


def test_operations_know_the_line_that_made_them():
    graph = read(PROGRAMS["nested"], X)
    assert all("programs.py" in str(op.source) for _, op in graph.walk())


def test_an_empty_graph_hands_its_inputs_on():
    assert evaluate(Graph([]), []) == []
    graph = read(lambda x: (x, x), X)
    assert not graph.ops and graph.outputs == [graph.inputs[0]] * 2
