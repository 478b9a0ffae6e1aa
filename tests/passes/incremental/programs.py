"""Small programs at two lengths, ready for a rule or for the derivation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from passes.graph import Graph, Op, Value
from passes.incremental.branches import inline_branches
from passes.incremental.derive import derive
from passes.incremental.plan import Plan
from passes.incremental.roles import Role
from passes.incremental.site import Site
from passes.incremental.state import State
from passes.incremental.time import Times, mark_dependent, read_times
from passes.reader import trace

SHORT, LONG = 12, 16


@dataclass(frozen=True)
class Program:
    """A function of tokens i32[1, T] at two lengths."""

    graph: Graph
    times: Times

    def op(self, name: str) -> Op:
        """The only operation of this name, loop bodies included."""
        (op,) = [op for _, op in self.graph.walk() if op.name == name]
        return op

    def site(self, name: str, roles: dict[int, Role]) -> Site:
        """A demand on the first result of the only operation of this name."""
        return self.site_of(self.op(name), roles)

    def site_of(self, op: Op, roles: dict[int, Role]) -> Site:
        """A demand on the first result of an operation."""
        return Site(op, op.results[0], roles, self.times, False, keep_nothing)

    def derive(self) -> Plan:
        return derive(self.graph, self.times, self.graph.inputs[-1])


def keep_nothing(*_: Any) -> State:
    raise AssertionError("this rule should keep no state")


def program(fn: Callable[..., Any], params: tuple[Any, ...] = (), *, branches: bool = False) -> Program:
    """Reads `fn(*params, tokens)` at two lengths; `branches` leaves `cond` as it is."""

    def at(length: int) -> Graph:
        return trace(fn, *params, jax.ShapeDtypeStruct((1, length), jnp.int32))[0]

    short, long = at(SHORT), at(LONG)
    times = read_times(short, long, SHORT, LONG)
    mark_dependent(times, long, [False] * (len(long.inputs) - 1) + [True])
    if not branches:
        inline_branches(long, times)
    return Program(long, times)


def extents(times: Times, value: Value) -> tuple[str, ...]:
    """The extents of a value's dimensions, sizes that do not move as numbers."""
    return tuple(str(extent or n) for extent, n in zip(times.extents[value], value.shape, strict=True))


def kept(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of each state, sorted."""
    return sorted((state.kind, state.shape) for state in plan.states)
