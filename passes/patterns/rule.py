"""A rewrite rule: what to look for, when it may be replaced, when it should, what with, and what that does to numbers.

Knows no driver. The one idea: legality, profitability and replacement all see a match by the roles of its axes, so none
of them depends on a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from passes.axes import Axes, Axis
from passes.graph import Value
from passes.layouts import lay_back, lay_out
from passes.numerics import Numerics
from passes.patterns.pattern import Pattern, State

Groups = tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class Match:
    """A match as a rule sees it: the value it replaces, its axes, and what was captured."""

    root: Value
    dims: tuple[tuple[Axis, ...], ...]
    state: State

    @property
    def axes(self) -> Axes:
        return self.state.axes

    def number(self, name: str) -> float:
        """A captured number."""
        return self.state.numbers[name]

    def span(self, name: str) -> tuple[Axis, ...]:
        """The axes that a name stands for, outermost first."""
        return self.axes.expand(self.state.spans[name])

    def held(self, name: str) -> tuple[Axis, ...]:
        """The axes of a captured value, outermost first; none where nothing was captured."""
        return self.axes.flat(self.state.captures[name].dims) if self.has(name) else ()

    def has(self, name: str) -> bool:
        """Whether something was captured."""
        return name in self.state.captures

    def value(self, name: str) -> Value:
        """A captured value."""
        return self.state.captures[name].value

    def rows(self, span: Sequence[Axis]) -> Groups:
        """Dimensions for what runs over `span`: those of the result where `span` is its last, else `span` put last."""
        own = tuple(self.axes.expand(dim) for dim in self.dims)
        if own and own[-1] == tuple(span):
            return own
        rest = [axis for axis in self.axes.flat(self.dims) if axis not in span]
        return (*((axis,) for axis in rest), tuple(span))


@dataclass(frozen=True)
class Builder:
    """What a rule builds its replacement with: captured arrays in the layout it asks for."""

    match: Match
    arrays: Mapping[Value, Any]

    def array(self, name: str, *wanted: Sequence[Axis], is_full: bool = False) -> Any:
        """A captured array with one dimension for each wanted product of axes.

        Args:
          is_full: Whether axes that it lacks are broadcast; else they are of size 1.
        """
        view = self.match.state.captures[name]
        value = view.value
        x = jnp.asarray(self.arrays[value] if value.const is None else value.const)
        numbers = self.match.state.numbers
        if f"{name}.start" in numbers:
            start, size, dim = (int(numbers[f"{name}.{key}"]) for key in ("start", "size", "dim"))
            x = lax.slice_in_dim(x, start, start + size, axis=dim)
        return lay_out(x, view.dims, self.match.axes, wanted, is_full=is_full)

    def result(self, x: Any, *held: Sequence[Axis]) -> Any:
        """The replacement in the layout and dtype of what it replaces, from dimensions with the axes `held`."""
        match = self.match
        flat = tuple(axis for group in held for axis in group)
        return lay_back(x, match.axes, flat, match.dims, match.root.shape).astype(match.root.dtype)


@dataclass(frozen=True)
class RewriteRule:
    """A rewrite.

    Attributes:
      build: Makes the replacement, as ordinary `jnp` or operations of ours.
      legality: Why a match may not be replaced, or None.
      profitability: Why it should not, or None.
      benefit: Rules with more are tried first.
      landmarks: A value that does not match is told of where the search got past an operation of each of these sets.
      other: The name of a captured value that is replaced too, by the second of two results of `build`.
      budget: The largest relative error of an approximate rule.
    """

    name: str
    pattern: Pattern
    build: Callable[[Builder], Any]
    numerics: Numerics
    legality: Callable[[Match], str | None] = lambda match: None
    profitability: Callable[[Match], str | None] = lambda match: None
    benefit: int = 1
    landmarks: tuple[frozenset[str], ...] = ()
    other: str | None = None
    budget: float | None = None
