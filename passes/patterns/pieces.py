"""Patterns for pairs along one axis: its two halves, its even and odd places, and both joined again.

The axis of H numbers is seen as a *pair* axis of 2 and the rest: the pair outside for halves, inside for even and odd
places. So both layouts, and a reshape to `[H / 2, 2]`, are one pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from passes.axes import Axis, View
from passes.graph import Op, Value
from passes.patterns.pattern import Pattern, State, look_through, match_all

PAIR = "pair"


def _pair(state: State) -> tuple[Axis, State]:
    """The axis of two, made where it is first wanted."""
    if PAIR in state.spans:
        (axis,) = state.axes.expand(state.spans[PAIR])
        return axis, state
    axis = Axis(2)
    return axis, replace(state, spans={**state.spans, PAIR: (axis,)})


@dataclass(frozen=True)
class Part(Pattern):
    """The first (0) or second (1) of each pair of a captured value."""

    name: str
    which: int

    def match(self, view: View, state: State) -> Iterator[State]:
        view, state = look_through(view, state)
        cut = _cut(view.value)
        if cut is None:
            state.trail.ends(state, view, f"one of each pair of {self.name}")
            return
        source, dim, start, stride, count = cut
        if len(view.dims) < len(source.shape):  # one of the results of `unstack`
            view = replace(view, dims=(*view.dims[:dim], (), *view.dims[dim:]))
        begin = start - self.which * (count if stride == 1 else 1)
        whole = source.shape[dim]
        if begin < 0 or begin + 2 * count > whole or stride > 2:
            state.trail.ends(state, view, f"number {self.which} of each pair of {self.name}")
            return
        pair, state = _pair(state)
        rest = view.dims[dim]
        dims = (*view.dims[:dim], (pair, *rest) if stride == 1 else (*rest, pair), *view.dims[dim + 1 :])
        found = View(source, dims)
        if whole == 2 * count:
            yield from self._bind(*look_through(found, state))
            return
        place = {"start": begin, "size": 2 * count, "dim": dim}
        with_place: State | None = state
        for key, number in place.items():
            with_place = with_place and with_place.with_number(f"{self.name}.{key}", float(number))
        if with_place is not None:
            yield from self._bind(found, with_place)

    def _bind(self, view: View, state: State) -> Iterator[State]:
        bound = state.captures.get(self.name)
        if bound is None:
            dtypes = {**state.dtypes, self.name: view.value.dtype}
            yield replace(state, captures={**state.captures, self.name: view}, dtypes=dtypes)
        elif bound.value is view.value and (learned := state.axes.unify_dims(bound.dims, view.dims)) is not None:
            yield replace(state, axes=learned)
        else:
            state.trail.ends(state, view, f"the other of each pair of {self.name}")

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset({"slice", "split"})


def _cut(value: Value) -> tuple[Value, int, int, int, int] | None:
    """What a slice along one axis is cut from: source, dimension, start, stride, number of elements."""
    op = value.op
    if op is None:
        return None
    if op.name == "split":
        dim, sizes = op.params["axis"], op.params["sizes"]
        return op.operands[0], int(dim), int(sum(sizes[: value.index])), 1, int(sizes[value.index])
    if op.name == "unstack":
        return op.operands[0], int(op.params["axis"]), value.index, 1, 1
    if op.name != "slice":
        return None
    source = op.operands[0]
    changed = [i for i, (a, b) in enumerate(zip(source.shape, value.shape, strict=True)) if a != b]
    if len(changed) != 1:
        return None
    (dim,) = changed
    strides = op.params["strides"]
    return source, dim, op.params["start_indices"][dim], strides[dim] if strides else 1, value.shape[dim]


@dataclass(frozen=True)
class Joined(Pattern):
    """Two values put together as the first and second of each pair: concatenated or stacked."""

    first: Pattern
    second: Pattern

    def match(self, view: View, state: State) -> Iterator[State]:
        view, state = look_through(view, state)
        op = view.value.op
        if op is None or op.name not in ("concatenate", "stack") or len(op.operands) != 2 or not _is_even(op):
            state.trail.ends(state, view, "two values joined")
            return
        is_stack = op.name == "stack"
        dim = op.params["axis" if is_stack else "dimension"]
        size = 1 if is_stack else op.operands[0].shape[dim]
        pair, state = _pair(state)
        rest = (Axis(size),) if size > 1 else ()
        learned = state.axes.unify(view.dims[dim], (pair, *rest))
        if learned is None:
            return
        dims = (*view.dims[:dim], *([] if is_stack else [rest]), *view.dims[dim + 1 :])
        state = replace(state, axes=learned).entering(op)
        views = [View(operand, dims) for operand in op.operands]
        yield from match_all(list(zip((self.first, self.second), views, strict=True)), state)

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset({"concatenate", "stack"})


def _is_even(op: Op) -> bool:
    """Whether both operands are of one size, and not empty."""
    return op.operands[0].shape == op.operands[1].shape and math.prod(op.result.shape) > 0
