"""Reshapes: how dimensions group, and where rows of a token lie when time is merged with other axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.incremental.errors import NotServable
from passes.incremental.roles import KEYS, Rows
from passes.incremental.rules import RULES
from passes.incremental.rules.layout import dimension_groups
from tests.passes.incremental.programs import LONG, program


@pytest.mark.parametrize(
    ("a", "b", "groups"),
    [
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((2, 3), (6,), [([0, 1], [0])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((4, 6), (2, 2, 6), [([0], [0, 1]), ([1], [2])]),
        ((4, 6), (8, 3), [([0, 1], [0, 1])]),
        ((2, 12, 5), (8, 3, 5), [([0, 1], [0, 1]), ([2], [2])]),
        ((3, 1), (3,), [([0], [0]), ([1], [])]),
        ((3,), (1, 3, 1), None),
        ((), (1, 1), None),
    ],
)
def test_dimension_groups(a, b, groups):
    got = dimension_groups(a, b)
    assert groups is None or got == groups
    assert_groups(a, b, got)


def assert_groups(a: tuple[int, ...], b: tuple[int, ...], groups: list[tuple[list[int], list[int]]]) -> None:
    """Each dimension stands in one group, in order, and both sides of a group have one size."""
    assert [d for left, _ in groups for d in left] == list(range(len(a)))
    assert [d for _, right in groups for d in right] == list(range(len(b)))
    assert all(np.prod([a[d] for d in left]) == np.prod([b[d] for d in right]) for left, right in groups)


@given(st.lists(st.integers(1, 4), max_size=5), st.data())
def test_groups_hold_for_any_two_shapes_of_one_size(factors: list[int], data: Any):
    def shape() -> tuple[int, ...]:
        order = data.draw(st.permutations(factors))
        ends = sorted(data.draw(st.sets(st.integers(1, max(len(order) - 1, 1)), max_size=3)) | {0, len(order)})
        return tuple(int(np.prod(order[i:j])) for i, j in zip(ends, ends[1:], strict=False))

    a, b = shape(), shape()
    assert_groups(a, b, dimension_groups(a, b))


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("shift", [0, 2])
def test_rows_of_a_merged_dimension_are_those_of_the_axes_apart(outer: int, inner: int, shift: int):
    x, positions = np.arange(outer * LONG * inner).reshape(outer, LONG, inner), np.array([5, 6, 7])
    role = Rows(shift, outer, inner)
    index = np.asarray(role.indices(jnp.asarray(positions), x.size))
    np.testing.assert_array_equal(x.reshape(-1)[index], x[:, positions - shift].reshape(-1))
    assert role.copies == outer * inner


@pytest.mark.parametrize(
    ("shape", "merged", "role", "operand_role"),
    [
        ((1, -1, 4, 8), (-1, 8), Rows(inner=4), Rows()),  # time and heads merged
        ((1, 4, -1, 8), (-1, 8), Rows(outer=4), Rows()),  # heads and time merged
        ((1, 2, -1, 2, 8), (-1, 8), Rows(outer=2, inner=2), Rows()),
        ((1, -1, 4, 8), (1, -1, 32), Rows(), Rows()),  # beside time only
        ((1, -1, 4, 8), (-1, 8), KEYS, KEYS),
        ((1, -1, 4, 8), (-1, 8), Rows(3, inner=4), Rows(3)),
    ],
)
def test_reshape_carries_roles_into_a_merge(shape, merged, role, operand_role):
    def fn(tokens):
        x = jnp.broadcast_to(tokens[0], (32, tokens.shape[1]))
        x = jnp.moveaxis(x.reshape(*[n for n in shape if n != -1], -1), -1, shape.index(-1))
        return jnp.exp(x).reshape(merged)

    read = program(fn)
    op = read.graph.ops[-1]
    assert op.name == "reshape"
    (dim,) = read.times.dims(op.results[0])
    site = read.site_of(op, {dim: role})
    (demand,) = RULES["reshape"](site).operands
    assert demand.value is op.operands[0] and demand.roles == (operand_role,)


def test_reshape_of_time_that_is_merged_already_keeps_what_stays_merged():
    def fn(tokens):
        x = jnp.broadcast_to(tokens[0, :, None], (2, tokens.shape[1], 3)).reshape(2, -1)
        return jnp.exp(x).reshape(-1)

    read = program(fn)
    (demand,) = RULES["reshape"](read.site_of(read.graph.ops[-1], {0: Rows(outer=2, inner=3)})).operands
    assert demand.roles == (Rows(inner=3),)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.reshape(1, -1, 4).sum(-1),  # blocks of four
        lambda x: jnp.exp(x.reshape(1, -1, 4)).reshape(1, -1)[:, ::1],  # split and merged again
        lambda x: (x[0, :, None] + x[0]).reshape(1, -1)[:, : x.shape[1]],  # two time axes as one
    ],
)
def test_split_or_doubly_merged_time_is_refused(fn):
    with pytest.raises(NotServable, match="splits time into blocks, or merges two time axes"):
        program(lambda tokens: blocks_to_rows(fn(jnp.sin(tokens)), tokens)).derive()


def blocks_to_rows(x: Any, tokens: Any) -> Any:
    return jnp.repeat(x, tokens.shape[1] // x.shape[1], axis=1)[..., None]
