"""Rewrite rules and the driver that applies them until nothing is left to do.

A rule says what it looks for, when it may replace it (legality), when it should (profitability), what with, and what
that does to numbers. The driver visits every value of a graph and of its loop bodies, users first, so that the largest
match wins, and visits again what a rewrite made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from passes.axes import Axes, Axis, View, fresh
from passes.dce import dce
from passes.graph import Graph, Op, Value
from passes.layouts import lay_back, lay_out
from passes.numerics import Numerics
from passes.patterns.pattern import Pattern, State
from passes.replacement import live_without, make_replacement, replace
from passes.result import PassResult, Remark


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
        """The axes of a captured value, outermost first."""
        return self.axes.flat(self.state.captures[name].dims)

    def value(self, name: str) -> Value:
        """A captured value."""
        return self.state.captures[name].value


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
    """

    name: str
    pattern: Pattern
    build: Callable[[Builder], Any]
    numerics: Numerics
    legality: Callable[[Match], str | None] = lambda match: None
    profitability: Callable[[Match], str | None] = lambda match: None
    benefit: int = 1


def apply_rules(graph: Graph, rules: Sequence[RewriteRule]) -> PassResult:
    """Rewrites in place to a fixed point, loop bodies too."""
    ordered = sorted(rules, key=lambda rule: -rule.benefit)
    result = PassResult()
    bodies = [graph, *(region for _, op in graph.walk() for region in op.regions)]
    for body in bodies:
        result += _apply_to(body, ordered)
    if result.matched:
        dce(graph)
    return result


def _apply_to(graph: Graph, rules: Sequence[RewriteRule]) -> PassResult:
    result, dead = PassResult(), set[Op]()
    todo = [op for op in reversed(graph.ops) if len(op.results) == 1]
    known = set(graph.ops)
    while todo:
        op = todo.pop(0)
        if op in dead:
            continue
        for rule in rules:
            found = _try(graph, rule, op.results[0])
            result += found
            if found.matched:
                dead.update(_gone(graph, op))
                new = [o for o in graph.ops if o not in known and len(o.results) == 1]
                known.update(new)
                todo = [*reversed(new), *todo]
                break
    return result


def _gone(graph: Graph, op: Op) -> set[Op]:
    """Operations that nothing needs any more, now that `op` is replaced."""
    return set(graph.ops) - live_without(graph, op.results[0], [])


def _try(graph: Graph, rule: RewriteRule, root: Value) -> PassResult:
    """Tries one rule at one value."""
    dims = fresh(root.shape)
    remark: PassResult = PassResult()
    for state in rule.pattern.match(View(root, dims), State()):
        match = Match(root, dims, state)
        reason = rule.legality(match) or rule.profitability(match)
        values = [view.value for view in state.captures.values() if view.value.const is None]
        operands = list(dict.fromkeys(values))
        if reason is None and live_without(graph, root, operands) & state.inside:
            reason = "a value inside is read elsewhere too"
        if reason is not None:
            remark = PassResult(remarks=(Remark.at(root.op, f"{rule.name}: {reason}"),)) if root.op else remark
            continue

        def compute(*arrays: Any, match: Match = match, operands: list[Value] = operands) -> Any:
            return rule.build(Builder(match, dict(zip(operands, arrays, strict=True))))

        rewrite = make_replacement(graph, rule.name, rule.numerics, compute, operands, root)
        replace(graph, rewrite, operands, root)
        return PassResult(matched=1, rewrites=(rewrite,))
    return remark
