"""Patterns as combinators: small descriptions of what computes a value, matched by roles of axes.

A pattern is matched against a value as it is seen from somewhere (a `View`), through layout operations and float casts.
Captures that occur twice must be one value read along the same axes; names of axes that occur twice must be the same
axes; operands of commutative operations match in any order, and chains of associative ones in any grouping.

The one idea: matching yields states and never changes one, so alternatives are tried by going on with the next.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from passes.axes import (
    Axes,
    Axis,
    View,
    contraction_views,
    operand_views,
    reduction_view,
    scalar_of,
)
from passes.axes import look_through as look_through_all
from passes.graph import Op

COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
ASSOCIATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor"})
MAX_FACTORS = 6
"""Operands of one chain that are tried in every order."""


@dataclass
class Trail:
    """How far a match came, over all alternatives, for telling why there is none.

    Attributes:
      inside: Operations that the best attempt got past.
      op: Where it ended.
      reason: What was expected there.
    """

    inside: frozenset[Op] = frozenset()
    op: Op | None = None
    reason: str = ""

    def ends(self, state: State, view: View, expected: str) -> None:
        """Notes that a match ended at a value that is not computed as expected."""
        op = view.value.op
        if len(state.inside) > len(self.inside):
            found = op.name if op is not None else "a constant" if view.value.const is not None else "an input"
            self.inside, self.op = state.inside, op or state.last
            self.reason = f"expected {expected}, found {found}"


@dataclass(frozen=True)
class State:
    """What a match has learned so far.

    Attributes:
      axes: What is known of axes.
      captures: Name -> the value and the axes it is read along.
      dtypes: Name -> the dtype that a captured value is read in, before any cast that was looked through.
      spans: Name -> axes that an operation runs over.
      numbers: Name -> a known number.
      inside: Operations that belong to the match.
      last: The operation that was entered last.
      trail: Shared by all states of one attempt.
    """

    axes: Axes = Axes()
    captures: Mapping[str, View] = field(default_factory=dict)
    dtypes: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    inside: frozenset[Op] = frozenset()
    last: Op | None = None
    trail: Trail = field(default_factory=Trail)

    def entering(self, *ops: Op) -> State:
        """The state with more operations in the match."""
        return replace(self, inside=self.inside | set(ops), last=ops[-1])

    def with_number(self, name: str, number: float) -> State | None:
        """The state with a name for a number; None where the name stands for another."""
        if self.numbers.get(name, number) != number:
            return None
        return replace(self, numbers={**self.numbers, name: number})

    def with_span(self, name: str, axes: tuple[Axis, ...]) -> State | None:
        """The state with a name for axes; None where the name stands for others."""
        if name not in self.spans:
            return replace(self, spans={**self.spans, name: axes})
        found, given = self.axes.expand(self.spans[name]), self.axes.expand(axes)
        if set(found) == set(given):
            return self
        learned = self.axes.unify(found, given) if len(found) == 1 or len(given) == 1 else None
        return None if learned is None else replace(self, axes=learned)


def look_through(view: View, state: State) -> tuple[View, State]:
    """The value behind layout operations and casts; a `stop_gradient` is none of them."""
    view, axes = look_through_all(view, state.axes, stops=False)
    return view, state if axes is state.axes else replace(state, axes=axes)


class Pattern(abc.ABC):
    """Something that a value may be computed as."""

    @abc.abstractmethod
    def match(self, view: View, state: State) -> Iterator[State]:
        """Every way in which it is."""

    @property
    def heads(self) -> frozenset[str] | None:
        """Names of the operations that may compute the value; None where any may."""
        return None

    def __or__(self, other: Pattern) -> Pattern:
        return Either((self, other))


@dataclass(frozen=True)
class Either(Pattern):
    """One of several patterns, tried in order."""

    options: tuple[Pattern, ...]

    def match(self, view: View, state: State) -> Iterator[State]:
        for option in self.options:
            yield from option.match(view, state)

    @property
    def heads(self) -> frozenset[str] | None:
        every = [option.heads for option in self.options]
        return None if None in every else frozenset[str]().union(*(heads for heads in every if heads is not None))

    def __or__(self, other: Pattern) -> Pattern:
        return Either((*self.options, other))


@dataclass(frozen=True)
class Capture(Pattern):
    """Any value; the same one wherever the name occurs.

    Attributes:
      inner: What the value must be computed as; None for anything.
      condition: What it must be besides.
    """

    name: str
    inner: Pattern | None = None
    condition: Callable[[View, State], bool] | None = None

    def match(self, view: View, state: State) -> Iterator[State]:
        dtype = view.value.dtype
        view, state = look_through(view, state)
        bound = state.captures.get(self.name)
        if bound is not None:
            if bound.value is view.value:
                learned = state.axes.unify_dims(bound.dims, view.dims)
                if learned is not None:
                    yield replace(state, axes=learned)
                    return
            state.trail.ends(state, view, f"{self.name} again, along the same axes")
            return
        if self.condition is not None and not self.condition(view, state):
            return
        inner = [state] if self.inner is None else self.inner.match(view, state)
        for found in inner:
            captures = {**found.captures, self.name: view}
            yield replace(found, captures=captures, dtypes={**found.dtypes, self.name: dtype})

    @property
    def heads(self) -> frozenset[str] | None:
        return None if self.inner is None else self.inner.heads


@dataclass(frozen=True)
class Number(Pattern):
    """A known number, the same for all elements.

    Attributes:
      value: What it must be, as rounded to its dtype; None for any.
      name: What it is called where its value is wanted.
    """

    value: float | None = None
    name: str | None = None

    def match(self, view: View, state: State) -> Iterator[State]:
        number = scalar_of(view.value)
        if number is None or self.value is not None and not _is_rounded(number, self.value, view.value.dtype):
            state.trail.ends(state, view, "a number" if self.value is None else f"{self.value:g}")
            return
        found = state if self.name is None else state.with_number(self.name, number)
        if found is None:
            state.trail.ends(state, view, f"{state.numbers[self.name or '']:g} again and not {number:g}")
        else:
            yield found

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset({"broadcast_in_dim"})


def _is_rounded(number: float, wanted: float, dtype: Any) -> bool:
    """Whether a number is the wanted one, exactly or rounded to a dtype or to float32."""
    return abs(number - wanted) <= 1e-6 * abs(wanted) or number == float(np.asarray(wanted).astype(dtype))


@dataclass(frozen=True)
class Apply(Pattern):
    """An elementwise operation of some name; chains of `add` and `mul` match in any order and grouping.

    Attributes:
      condition: What its parameters must be besides.
    """

    names: tuple[str, ...]
    operands: tuple[Pattern, ...]
    condition: Callable[[Op], bool] | None = None

    def match(self, view: View, state: State) -> Iterator[State]:
        view, state = look_through(view, state)
        op = view.value.op
        if op is None or op.name not in self.names or len(op.results) != 1 or not self._allows(op):
            state.trail.ends(state, view, " or ".join(self.names))
            return
        patterns = _flattened(self, op.name) if op.name in ASSOCIATIVE and self.condition is None else self.operands
        if len(patterns) > 2 and op.name in ASSOCIATIVE:
            for factors, links, axes in _chains(op, view, state.axes, len(patterns)):
                yield from _assign(patterns, factors, replace(state, axes=axes).entering(*links, op))
            return
        views = operand_views(op, view.dims)
        if len(views) != len(patterns):
            return
        if op.name in COMMUTATIVE:
            yield from _assign(patterns, views, state.entering(op))
        else:
            yield from match_all(list(zip(patterns, views, strict=True)), state.entering(op))

    def _allows(self, op: Op) -> bool:
        return self.condition is None or self.condition(op)

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset(self.names)


def _flattened(pattern: Apply, name: str) -> tuple[Pattern, ...]:
    """The operands, with those of the same operation in place of the operation."""
    out: list[Pattern] = []
    for operand in pattern.operands:
        if isinstance(operand, Apply) and operand.names == (name,) and operand.condition is None:
            out += _flattened(operand, name)
        else:
            out.append(operand)
    return tuple(out)


def _assign(patterns: Sequence[Pattern], views: Sequence[View], state: State) -> Iterator[State]:
    """Every way of giving each pattern a view of its own, the pattern that says most first."""
    if not patterns:
        yield state
        return
    first = max(range(len(patterns)), key=lambda i: _says(patterns[i], state))
    rest = [*patterns[:first], *patterns[first + 1 :]]
    for i, view in enumerate(views):
        for found in patterns[first].match(view, state):
            yield from _assign(rest, [*views[:i], *views[i + 1 :]], found)


def _says(pattern: Pattern, state: State) -> int:
    """How much a pattern narrows what it matches."""
    if isinstance(pattern, Number):
        return 3 if pattern.value is not None else 2
    if isinstance(pattern, Capture) and pattern.name in state.captures:
        return 4
    return 1 if pattern.heads is not None else 0


def _chains(op: Op, view: View, axes: Axes, size: int) -> Iterator[tuple[list[View], frozenset[Op], Axes]]:
    """The ways of seeing a chain of one associative operation as a number of operands."""
    if size > MAX_FACTORS:
        return
    todo: list[tuple[list[View], frozenset[Op], Axes]] = [(operand_views(op, view.dims), frozenset({op}), axes)]
    seen: set[frozenset[Op]] = set()
    while todo:
        factors, links, known = todo.pop()
        if links in seen:
            continue
        seen.add(links)
        if len(factors) == size:
            yield factors, links, known
            continue
        for i, factor in enumerate(factors):
            root, more = look_through_all(factor, known, stops=False)
            inner = root.value.op
            if inner is not None and inner.name == op.name and inner not in links:
                split = [*factors[:i], *operand_views(inner, root.dims), *factors[i + 1 :]]
                todo.append((split, links | {inner}, more))


@dataclass(frozen=True)
class Reduce(Pattern):
    """A reduction of some name along the axes called `over`."""

    name: str
    operand: Pattern
    over: str

    def match(self, view: View, state: State) -> Iterator[State]:
        view, state = look_through(view, state)
        op = view.value.op
        if op is None or op.name != self.name:
            state.trail.ends(state, view, self.name)
            return
        inner, reduced = reduction_view(op, view.dims)
        for found in self.operand.match(inner, state.entering(op)):
            named = found.with_span(self.over, reduced)
            if named is None:
                found.trail.ends(found, view, f"a reduction along {self.over}")
            else:
                yield named

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset({self.name})


@dataclass(frozen=True)
class Contract(Pattern):
    """A `dot_general` of two values along the axes called `over`, operands in either order."""

    first: Pattern
    second: Pattern
    over: str

    def match(self, view: View, state: State) -> Iterator[State]:
        view, state = look_through(view, state)
        op = view.value.op
        if op is None or op.name != "dot_general":
            state.trail.ends(state, view, "dot_general")
            return
        first, second, contracted = contraction_views(op, view.dims)
        named = state.entering(op).with_span(self.over, contracted)
        if named is None:
            return
        for left, right in ((first, second), (second, first)):
            yield from match_all([(self.first, left), (self.second, right)], named)

    @property
    def heads(self) -> frozenset[str] | None:
        return frozenset({"dot_general"})


@dataclass(frozen=True)
class Where(Pattern):
    """A pattern with a condition on the whole state.

    Attributes:
      reason: What the condition asks for, as told where it does not hold.
    """

    inner: Pattern
    condition: Callable[[State], bool]
    reason: str = "what a condition asks for"

    def match(self, view: View, state: State) -> Iterator[State]:
        for found in self.inner.match(view, state):
            if self.condition(found):
                yield found
            else:
                found.trail.ends(found, view, self.reason)

    @property
    def heads(self) -> frozenset[str] | None:
        return self.inner.heads


def match_all(todo: Sequence[tuple[Pattern, View]], state: State) -> Iterator[State]:
    """Every way in which all patterns match their views."""
    if not todo:
        yield state
        return
    (pattern, view), *rest = todo
    for found in pattern.match(view, state):
        yield from match_all(rest, found)


def apply(names: str, *operands: Pattern, condition: Callable[[Op], bool] | None = None) -> Apply:
    """An elementwise operation; `names` may give several, separated by `|`."""
    return Apply(tuple(names.split("|")), operands, condition)


def axes_of(state: State, name: str) -> frozenset[Axis]:
    """The axes of a captured value."""
    return frozenset(state.axes.flat(state.captures[name].dims))
