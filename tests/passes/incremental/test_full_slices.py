"""A slice that takes everything at the longer length is put back, and only that."""

import jax
import jax.numpy as jnp
import pytest

from passes.incremental.errors import NotServable
from passes.incremental.time import read_times
from passes.reader import trace

TABLE = jax.ShapeDtypeStruct((16, 4), jnp.float32)


def traces(fn):
    return [trace(fn, TABLE, jax.ShapeDtypeStruct((1, length), jnp.int32))[0] for length in (8, 16)]


def names(graph):
    return [op.name for op in graph.ops]


def test_a_table_as_long_as_the_context_is_sliced_at_both_lengths():
    short, long = traces(lambda table, tokens: table[tokens] + table[: tokens.shape[1]] * jnp.sum(table))
    assert names(short).count("slice") == 1 and names(long).count("slice") == 0
    times = read_times(short, long, 8, 16)
    assert names(short) == names(long)
    sliced = next(op for op in long.ops if op.name == "slice")
    assert sliced.result.shape == (16, 4)
    assert times.extents[sliced.result][0].scale == 1
    readers = {op.name for op in long.ops if sliced.result in op.operands}
    whole = {op.name for op in long.ops if long.inputs[0] in op.operands}
    assert "reduce_sum" in whole and "reduce_sum" not in readers
    assert "slice" in whole and readers


def test_a_slice_that_is_an_output_or_in_a_loop_is_put_back():
    def fn(table, tokens):
        rows = jnp.zeros((tokens.shape[1], 4))
        carry, _ = jax.lax.scan(lambda x, _: (x + table[: tokens.shape[1]], None), rows, None, length=2)
        return carry, table[: tokens.shape[1]]

    short, long = traces(fn)
    read_times(short, long, 8, 16)
    assert long.outputs[1].op.name == "slice"
    assert [op.name for _, op in short.walk()] == [op.name for _, op in long.walk()]


@pytest.mark.parametrize(
    "fn",
    [
        lambda table, tokens: table[1 : tokens.shape[1]] if tokens.shape[1] == 8 else table * 2,
        lambda table, tokens: table[: tokens.shape[1]] if tokens.shape[1] == 8 else jnp.sin(table),
    ],
)
def test_a_program_that_differs_otherwise_is_still_refused(fn):
    short, long = traces(fn)
    with pytest.raises(NotServable, match="changes with the length"):
        read_times(short, long, 8, 16)


def test_programs_without_such_a_slice_stay_as_they_are():
    short, long = traces(lambda table, tokens: table[:4] @ table.T + tokens.sum())
    before = list(long.ops)
    read_times(short, long, 8, 16)
    assert long.ops == before
