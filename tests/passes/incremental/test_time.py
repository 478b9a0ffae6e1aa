"""Time is what moves between two traces of one program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.incremental.errors import NotServable
from passes.incremental.time import PLAIN, mark_dependent, read_times
from passes.reader import trace
from tests.passes.incremental.programs import LONG, extents, program


def outputs_of(fn: Any) -> list[tuple[str, ...]]:
    read = program(fn)
    return [extents(read.times, v) for v in read.graph.outputs]


def test_extents_tell_time_from_sizes_and_offsets():
    def fn(tokens):
        x = jnp.sin(tokens)
        doubled = jnp.concatenate([x, x], axis=1)
        return x, x[:, 1:], jnp.pad(x, ((0, 0), (3, 0))), doubled, x.reshape(1, -1, 4), x[:, :5], x[0, :, None] + x

    assert outputs_of(fn) == [
        ("1", "T"),
        ("1", "T-1"),
        ("1", "T+3"),
        ("1", "2T"),
        ("1", "1/4T", "4"),
        ("1", "5"),
        ("T", "T"),
    ]


def test_a_width_that_equals_one_of_the_lengths_is_no_time():
    assert outputs_of(lambda tokens: jnp.ones((LONG, 12)) * tokens[0, 0]) == [(str(LONG), "12")]


def test_bodies_of_loops_are_read_too():
    def fn(tokens):
        return lax.scan(lambda c, _: (c + jnp.cos(tokens), None), jnp.zeros(tokens.shape), None, length=3)[0]

    read = program(fn)
    body = read.op("scan").regions[0]
    assert [extents(read.times, v) for v in body.outputs] == [("1", "T")]
    assert not read.times.moves(read.op("scan"), "length")


def test_describe_writes_time_as_t():
    read = program(lambda tokens: jnp.sin(tokens)[:, 2:])
    assert read.times.describe(read.graph.outputs[0]) == "float32[1, T-2]"


def test_constants_that_depend_on_the_length_are_noted():
    def fn(tokens):
        table = jnp.asarray(np.arange(tokens.shape[1], dtype=np.float32))  # a longer one begins with the shorter one
        return tokens / tokens.shape[1] + table * np.float32(2.0)

    read = program(fn)
    values = [float(v.const) for v, _ in read.times.length_dependent if np.ndim(v.const) == 0]
    assert values == [LONG] and len(read.times.length_dependent) == 1


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda tokens: sum(tokens[:, i] for i in range(tokens.shape[1])), "changes with the length: a Python loop"),
        (
            lambda tokens: tokens[0, :, None, None] * tokens[0, :, None] if tokens.shape[1] > 12 else tokens,
            "with the length",
        ),
    ],
)
def test_a_program_that_changes_with_the_length_is_refused(fn: Any, reason: str):
    with pytest.raises(NotServable, match=reason):
        program(fn)


def test_a_size_that_no_line_goes_through_is_refused():
    short, long = (
        trace(lambda tokens: jnp.ones(tokens.shape[1] ** 2 // 5), jax.ShapeDtypeStruct((1, n), jnp.int32))[0]
        for n in (12, 19)
    )
    with pytest.raises(NotServable, match="a dimension is 28 at length 12 and 72 at 19, not linear in it"):
        read_times(short, long, 12, 19)


def test_dependence_on_tokens_is_a_fixed_point_over_carries():
    """Tokens enter the first carry; the third sees them two trips later; the last never."""

    def fn(p, tokens):
        def body(carry, _):
            a, b, c, d = carry
            return (a + tokens.sum(), b + a, c + b, d + p), None

        return lax.scan(body, (0, 0, 0, 0), None, length=4)[0]

    read = program(fn, (jax.ShapeDtypeStruct((), jnp.int32),))
    assert [read.times.is_dependent(v) for v in read.graph.outputs] == [True, True, True, False]


def test_one_length_alone_goes_by_size_and_follows_padding_and_cuts():
    def fn(tokens):
        x = jnp.sin(tokens)
        return x, jnp.pad(x, ((0, 0), (2, 0))), x[:, :-1], x[:, :3]

    graph = trace(fn, jax.ShapeDtypeStruct((1, LONG), jnp.int32))[0]
    times = read_times(graph, graph, LONG, LONG)
    mark_dependent(times, graph, [True])
    assert [extents(times, v)[1] for v in graph.outputs] == ["T", "T+2", "T-1", "3"]
    assert times.extent(graph.outputs[0], 1) == PLAIN
    with pytest.raises(RuntimeError, match="is not time"):
        times.extent(graph.outputs[0], 0)
