"""Patterns as combinators: small descriptions of what computes a value, matched by roles of axes.

A pattern is matched against a value as it is seen from somewhere (a `View`), through layout operations and float casts.
Captures that occur twice must be one value read along the same axes; names of axes that occur twice must be the same
axes; operands of commutative operations match in any order, and chains of associative ones in any grouping.

The one idea: matching yields states and never changes one, so alternatives are tried by going on with the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from passes.axes import (
    Axes,
    Axis,
    View,
    contraction_views,
    look_through,
    operand_views,
    reduction_view,
    scalar_of,
)
from passes.graph import Op

COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
ASSOCIATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor"})
MAX_FACTORS = 5
"""Operands of one chain that are tried in every order."""


@dataclass(frozen=True)
class State:
    """What a match has learned so far.

    Attributes:
      axes: What is known of axes.
      captures: Name -> the value and the axes it is read along.
      spans: Name -> axes that an operation runs over.
      numbers: Name -> a known number.
      inside: Operations that belong to the match.
      deepest: The operation that the match reached last, for telling why it failed.
    """

    axes: Axes = Axes()
    captures: Mapping[str, View] = field(default_factory=dict)
    spans: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    inside: frozenset[Op] = frozenset()

    def entering(self, op: Op) -> State:
        """The state with one more operation in the match."""
        return replace(self, inside=self.inside | {op})

    def with_span(self, name: str, axes: tuple[Axis, ...]) -> State | None:
        """The state with a name for axes; None where the name stands for others."""
        if name not in self.spans:
            return replace(self, spans={**self.spans, name: axes})
        found = self.axes.expand(self.spans[name])
        if set(found) == set(self.axes.expand(axes)):
            return self
        learned = self.axes.unify(found, axes) if len(found) == 1 else None
        return None if learned is None else replace(self, axes=learned)


class Pattern:
    """Something that a value may be computed as."""

    def match(self, view: View, state: State) -> Iterator[State]:
        """Every way in which it is."""
        raise NotImplementedError

    def __or__(self, other: Pattern) -> Pattern:
        return Either((self, other))


@dataclass(frozen=True)
class Either(Pattern):
    """One of several patterns, tried in order."""

    options: tuple[Pattern, ...]

    def match(self, view: View, state: State) -> Iterator[State]:
        for option in self.options:
            yield from option.match(view, state)

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
        view, axes = look_through(view, state.axes)
        state = replace(state, axes=axes)
        bound = state.captures.get(self.name)
        if bound is not None:
            if bound.value is view.value:
                learned = axes.unify_dims(bound.dims, view.dims)
                if learned is not None:
                    yield replace(state, axes=learned)
            return
        if self.condition is not None and not self.condition(view, state):
            return
        inner = [state] if self.inner is None else self.inner.match(view, state)
        for found in inner:
            yield replace(found, captures={**found.captures, self.name: view})


@dataclass(frozen=True)
class Number(Pattern):
    """A known number, the same for all elements.

    Attributes:
      value: What it must be, within rounding; None for any.
      name: What it is called where its value is wanted.
    """

    value: float | None = None
    name: str | None = None
    tolerance: float = 1e-6

    def match(self, view: View, state: State) -> Iterator[State]:
        number = scalar_of(view.value)
        if number is None or self.value is not None and abs(number - self.value) > self.tolerance * abs(self.value):
            return
        if self.name is None:
            yield state
        elif state.numbers.get(self.name, number) == number:
            yield replace(state, numbers={**state.numbers, self.name: number})


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
        view, axes = look_through(view, state.axes)
        op = view.value.op
        if op is None or op.name not in self.names or len(op.results) != 1:
            return
        if self.condition is not None and not self.condition(op):
            return
        state = replace(state, axes=axes)
        if op.name in ASSOCIATIVE and len(self._flattened(op.name)) > 2:
            yield from self._match_chain(op, view, state)
            return
        views = operand_views(op, view.dims)
        if len(views) != len(self.operands):
            return
        orders = [views, views[::-1]] if op.name in COMMUTATIVE and len(views) == 2 else [views]
        for order in orders:
            yield from match_all(list(zip(self.operands, order, strict=True)), state.entering(op))

    def _flattened(self, name: str) -> tuple[Pattern, ...]:
        """The operands, with those of the same operation in place of the operation."""
        out: list[Pattern] = []
        for operand in self.operands:
            out += operand._flattened(name) if isinstance(operand, Apply) and operand.names == (name,) else [operand]
        return tuple(out)

    def _match_chain(self, op: Op, view: View, state: State) -> Iterator[State]:
        patterns = self._flattened(op.name)
        for factors, links, axes in _chains(op, view, state.axes, len(patterns)):
            after = replace(state, axes=axes, inside=state.inside | links)
            for order in itertools.permutations(factors):
                yield from match_all(list(zip(patterns, order, strict=True)), after)


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
            root, more = look_through(factor, known)
            inner = root.value.op
            if inner is not None and inner.name == op.name:
                split = [*factors[:i], *operand_views(inner, root.dims), *factors[i + 1 :]]
                todo.append((split, links | {inner}, more))


@dataclass(frozen=True)
class Reduce(Pattern):
    """A reduction of some name along the axes called `over`."""

    name: str
    operand: Pattern
    over: str

    def match(self, view: View, state: State) -> Iterator[State]:
        view, axes = look_through(view, state.axes)
        op = view.value.op
        if op is None or op.name != self.name:
            return
        inner, reduced = reduction_view(op, view.dims)
        for found in self.operand.match(inner, replace(state, axes=axes).entering(op)):
            named = found.with_span(self.over, reduced)
            if named is not None:
                yield named


@dataclass(frozen=True)
class Contract(Pattern):
    """A `dot_general` of two values along the axes called `over`, operands in either order."""

    first: Pattern
    second: Pattern
    over: str

    def match(self, view: View, state: State) -> Iterator[State]:
        view, axes = look_through(view, state.axes)
        op = view.value.op
        if op is None or op.name != "dot_general":
            return
        first, second, contracted = contraction_views(op, view.dims)
        named = replace(state, axes=axes).entering(op).with_span(self.over, contracted)
        if named is None:
            return
        for left, right in ((first, second), (second, first)):
            yield from match_all([(self.first, left), (self.second, right)], named)


@dataclass(frozen=True)
class Where(Pattern):
    """A pattern with a condition on the whole state."""

    inner: Pattern
    condition: Callable[[State], bool]

    def match(self, view: View, state: State) -> Iterator[State]:
        yield from (found for found in self.inner.match(view, state) if self.condition(found))


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


def span_of(state: State, name: str) -> frozenset[Axis]:
    """The axes that a name stands for."""
    return frozenset(state.axes.expand(state.spans[name]))


def axes_of(state: State, name: str) -> frozenset[Axis]:
    """The axes of a captured value."""
    return frozenset(state.axes.flat(state.captures[name].dims))
