import jax.numpy as jnp
import pytest
from jax import lax

from passes.graph import Value
from passes.verify import MalformedGraph, verify
from tests.passes.graphs import read

X = jnp.ones((2, 2))


def scanned():
    return read(lambda x: lax.scan(lambda c, row: (c @ row, c), x, jnp.stack([x, x])), X)


def drop_definition(graph):
    del graph.ops[0]


def use_before_definition(graph):
    graph.ops.reverse()


def repeat_an_operation(graph):
    graph.ops.append(graph.ops[0])


def use_another_graphs_value(graph):
    graph.ops[-1].operands[0] = Value(graph.ops[-1].operands[0].aval)


def change_an_operand_type(graph):
    graph.ops[-1].operands[0] = graph.ops[0].operands[0]


def change_a_result_type(graph):
    graph.ops[-1].results[0].aval = graph.ops[-1].results[0].aval.update(dtype=jnp.dtype(jnp.float16))


def lose_a_result_number(graph):
    graph.ops[-1].results[0].index = 7


def drop_an_output_definition(graph):
    graph.outputs = [Value(graph.outputs[0].aval)]


@pytest.mark.parametrize(
    "harm",
    [
        drop_definition,
        use_before_definition,
        repeat_an_operation,
        use_another_graphs_value,
        change_an_operand_type,
        change_a_result_type,
        lose_a_result_number,
        drop_an_output_definition,
    ],
)
def test_broken_invariants_are_found(harm):
    graph = read(lambda x: jnp.matmul(x[:, :1].T, x) * 2.0, X)
    verify(graph)
    harm(graph)
    with pytest.raises(MalformedGraph):
        verify(graph)


def lose_an_operand(op):
    op.operands.pop()


def count_carries_wrongly(op):
    op.params["num_carry"] += 1


def lose_a_body_output(op):
    op.regions[0].outputs.pop()


def scan_an_unstacked_operand(op):
    op.operands[-1] = op.operands[0]


def change_the_length(op):
    op.params["length"] += 1


def harm_the_body(op):
    op.regions[0].ops.clear()


@pytest.mark.parametrize(
    "harm",
    [
        lose_an_operand,
        count_carries_wrongly,
        lose_a_body_output,
        scan_an_unstacked_operand,
        change_the_length,
        harm_the_body,
    ],
)
def test_regions_that_do_not_fit_are_found(harm):
    graph = scanned()
    verify(graph)
    harm(next(op for op in graph.ops if op.name == "scan"))
    with pytest.raises(MalformedGraph):
        verify(graph)


def test_the_message_names_the_operation_and_the_line():
    graph = read(lambda x: jnp.sin(x) * 2.0, X)
    graph.ops[-1].operands[0] = Value(graph.ops[-1].operands[0].aval)
    with pytest.raises(MalformedGraph, match=r"mul at .*test_verify\.py:\d+: operand 0 .*used before it is defined"):
        verify(graph)
