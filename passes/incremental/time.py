"""Which dimensions are time: those that move when the model is traced at another length.

Two graphs of the same program, at a short and at a long length, are walked side by side. Every size becomes `a * T +
o`. A model that runs at one length only is read from that length alone: a dimension of exactly that size is time,
and padding or cutting a time dimension leaves it one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import numpy as np

from passes.graph import Graph, Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.full_slices import restore_full_slices


@dataclass(frozen=True)
class Extent:
    """The size of a time dimension, `scale * T + offset`."""

    scale: Fraction
    offset: int

    def __str__(self) -> str:
        head = "T" if self.scale == 1 else f"{self.scale}T"
        return head + (f"{self.offset:+d}" if self.offset else "")


PLAIN = Extent(Fraction(1), 0)


@dataclass(eq=False)
class Times:
    """What moves with the length, for every value of the long graph and its regions.

    Attributes:
      short, long: The two lengths, in tokens; equal for a model of one length.
      remarks: Constants whose value depends on the length; the step uses their value at capacity.
    """

    short: int
    long: int
    extents: dict[Value, tuple[Extent | None, ...]] = field(default_factory=dict)
    short_params: dict[Op, dict[str, Any]] = field(default_factory=dict)
    length_dependent: list[tuple[Value, Op | None]] = field(default_factory=list)
    dependent: set[Value] = field(default_factory=set)

    def dims(self, value: Value) -> tuple[int, ...]:
        """The time dimensions of a value."""
        return tuple(d for d, extent in enumerate(self.extents.get(value, ())) if extent is not None)

    def extent(self, value: Value, dim: int) -> Extent:
        extent = self.extents[value][dim]
        if extent is None:
            raise RuntimeError(f"dimension {dim} of {value} is not time")
        return extent

    def is_dependent(self, value: Value) -> bool:
        """Whether a value depends on the tokens."""
        return value in self.dependent

    def has_own_rows(self, value: Value) -> bool:
        """Whether a value has one time axis, each row of which belongs to one token and to no later one."""
        dims = self.dims(value)
        if len(dims) != 1 or value.const is not None:
            return False
        extent = self.extent(value, dims[0])
        return extent.scale == 1 and extent.offset <= 0

    def moves(self, op: Op, key: str) -> bool:
        """Whether a parameter of an operation differs between the two lengths."""
        return self.short_params[op].get(key) != op.params.get(key)

    def describe(self, value: Value) -> str:
        """A shape with time written as T, for messages."""
        extents = self.extents.get(value) or (None,) * len(value.shape)
        return f"{value.dtype}[{', '.join(str(e or n) for e, n in zip(extents, value.shape, strict=True))}]"


def read_times(short_graph: Graph, long_graph: Graph, short: int, long: int) -> Times:
    """Pairs two graphs of one program, traced at two lengths.

    Raises:
      NotServable: the program itself changes with the length, as a Python loop over time makes it.
    """
    times = Times(short, long)
    restore_full_slices(short_graph, long_graph)
    _pair(times, short_graph, long_graph)
    return times


def _pair(times: Times, a: Graph, b: Graph) -> None:
    for u, v in zip(a.inputs, b.inputs, strict=True):
        _note(times, u, v, None)
    for op_a, op_b in _aligned(a.ops, b.ops):
        for u, v in zip(op_a.operands, op_b.operands, strict=True):
            if v.const is not None:
                _note_constant(times, u, v, op_b)
        times.short_params[op_b] = op_a.params
        for u, v in zip(op_a.results, op_b.results, strict=True):
            _note(times, u, v, op_b)
        for region_a, region_b in zip(op_a.regions, op_b.regions, strict=True):
            _pair(times, region_a, region_b)
    for u, v in zip(a.outputs, b.outputs, strict=True):
        if v.const is not None:
            _note_constant(times, u, v, None)


def _aligned(a: list[Op], b: list[Op]) -> Iterator[tuple[Op, Op]]:
    """Pairs the operations of two traces, which must be the same ones."""
    for op_a, op_b in zip_longest(a, b):
        if op_a is None or op_b is None or not _same_kind(op_a, op_b):
            raise NotServable(
                "the program itself changes with the length: a Python loop or branch over time; write the loop as "
                "jax.lax.scan or jax.lax.map, whose body does not depend on the length",
                op_b or op_a,
                detail=f"{_name(op_a)} at one length, {_name(op_b)} at another",
            )
        yield op_a, op_b


def _same_kind(a: Op, b: Op) -> bool:
    parts = ((a.operands, b.operands), (a.results, b.results), (a.regions, b.regions))
    return a.name == b.name and all(len(x) == len(y) for x, y in parts)


def _name(op: Op | None) -> str:
    return "nothing" if op is None else op.name


def _note(times: Times, u: Value, v: Value, op: Op | None) -> None:
    if len(u.shape) != len(v.shape):
        raise NotServable("the number of dimensions changes with the length", op)
    if times.short == times.long:
        times.extents[v] = _one_length(times, v, op)
        return
    step = times.long - times.short
    out: list[Extent | None] = []
    for x, y in zip(u.shape, v.shape, strict=True):
        scale = Fraction(y - x, step)
        offset = y - scale * times.long
        if x != y and offset.denominator != 1:
            raise NotServable(
                f"a dimension is {x} at length {times.short} and {y} at {times.long}, not linear in it", op
            )
        out.append(None if x == y else Extent(scale, int(offset)))
    times.extents[v] = tuple(out)


def _one_length(times: Times, v: Value, op: Op | None) -> tuple[Extent | None, ...]:
    out: list[Extent | None] = [PLAIN if n == times.long else None for n in v.shape]
    if op is not None and op.name in ("pad", "slice", "concatenate", "split", "conv_general_dilated") and op.operands:
        u = op.operands[0]
        for d, extent in enumerate(times.extents.get(u, ())[: len(out)]):
            if extent is not None and out[d] is None and v.shape[d] > times.long // 2:
                out[d] = Extent(extent.scale, extent.offset + v.shape[d] - u.shape[d])
    return tuple(out)


def _note_constant(times: Times, u: Value, v: Value, op: Op | None) -> None:
    if v in times.extents:
        return
    _note(times, u, v, op)
    a, b = np.asarray(u.const), np.asarray(v.const)
    if a.dtype == object or b.dtype == object:
        return
    common = b[tuple(slice(0, n) for n in a.shape)]
    if a.shape != common.shape or a.tobytes() != np.ascontiguousarray(common).tobytes():
        times.length_dependent.append((v, op))


def mark_dependent(times: Times, graph: Graph, flags: list[bool]) -> list[bool]:
    """Marks every value that depends on the inputs flagged; carries of loops are a least fixed point.

    Returns: For each output of the graph whether it depends on them.
    """
    for value, flag in zip(graph.inputs, flags, strict=True):
        if flag:
            times.dependent.add(value)
    for op in graph.ops:
        given = [v in times.dependent for v in op.operands]
        results = [any(given)] * len(op.results)
        if op.name == "scan":
            results = _scan_fixpoint(times, op, given)
        elif op.name == "cond":
            branches = [mark_dependent(times, region, given[1:]) for region in op.regions]
            results = [given[0] or any(column) for column in zip(*branches, strict=True)]
        times.dependent.update(v for v, flag in zip(op.results, results, strict=True) if flag)
    return [v in times.dependent for v in graph.outputs]


def _scan_fixpoint(times: Times, op: Op, given: list[bool]) -> list[bool]:
    num_consts, num_carry = op.params["num_consts"], op.params["num_carry"]
    while True:
        results = mark_dependent(times, op.regions[0], given)
        carry = [a or b for a, b in zip(given[num_consts:], results[:num_carry], strict=False)]
        widened = given[:num_consts] + carry + given[num_consts + num_carry :]
        if widened == given:
            return results
        given = widened
