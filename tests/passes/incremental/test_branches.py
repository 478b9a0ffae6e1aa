"""`cond` over tokens is written out as its branches and a selection; what stands beside time is left alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.incremental.branches import inline_branches
from tests.passes.graphs import names, run
from tests.passes.incremental.programs import LONG, program

FLAG = jax.ShapeDtypeStruct((), jnp.int32)
TOKENS = np.arange(LONG, dtype=np.int32)[None]


def by_cond(flag: Any, tokens: Any) -> Any:
    return lax.cond(flag > 0, lambda x: jnp.sin(x), lambda x: x * 2.0, tokens.astype(jnp.float32))


def by_switch(flag: Any, tokens: Any) -> Any:
    x = tokens.astype(jnp.float32)
    return lax.switch(flag, [jnp.sin, jnp.cos, lambda x: -x, lambda x: x + 1], x)


def in_a_loop(flag: Any, tokens: Any) -> Any:
    def body(x: Any, i: Any) -> tuple[Any, None]:
        return lax.cond(i < flag, lambda x: x + 1.0, lambda x: x * 2.0, x), None

    return lax.scan(body, tokens.astype(jnp.float32), jnp.arange(3))[0]


def nested(flag: Any, tokens: Any) -> Any:
    x = tokens.astype(jnp.float32)
    return lax.cond(flag > 0, lambda x: lax.cond(flag > 1, jnp.sin, jnp.cos, x), lambda x: x, x)


@pytest.mark.parametrize(("fn", "count"), [(by_cond, 1), (by_switch, 1), (in_a_loop, 1), (nested, 2)])
def test_branches_become_a_selection_of_equal_value(fn: Any, count: int):
    read = program(fn, (FLAG,), branches=True)
    assert names(read.graph)["cond"] == count
    inlined = inline_branches(read.graph, read.times)
    while names(read.graph)["cond"]:  # branches of what was written out
        inlined += inline_branches(read.graph, read.times)
    assert inlined == count and names(read.graph)["select_n"] >= count
    for flag in range(4):
        (got,) = run(read.graph, np.int32(flag), TOKENS)
        np.testing.assert_allclose(np.asarray(got), np.asarray(jax.jit(fn)(flag, TOKENS)), rtol=1e-6)
    assert inline_branches(read.graph, read.times) == 0


@pytest.mark.parametrize("fn", [by_cond, by_switch, in_a_loop])
def test_what_is_written_out_keeps_its_time_and_its_dependence(fn: Any):
    read = program(fn, (FLAG,))
    for graph, op in read.graph.walk():
        for value in op.results:
            assert value in read.times.extents
        if op.name == "select_n":
            assert read.times.dims(op.results[0]) == (1,) and read.times.is_dependent(op.results[0])
            assert op.source.frames and graph is not None


def test_a_branch_among_parameters_is_left_alone():
    def fn(flag: Any, tokens: Any) -> Any:
        return tokens * lax.cond(flag > 0, lambda: 2, lambda: 3)

    assert names(program(fn, (FLAG,)).graph)["cond"] == 1
