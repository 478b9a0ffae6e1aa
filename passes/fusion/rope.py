"""The pass `rope`: a rotation of pairs by cosines and sines becomes one operation.

Matches: pairs of halves or side by side; products joined again by `concatenate` or `stack`, or
`x * cos + rotated * sin` with `rotated = [-second, first]`; cosines and sines of H / 2 numbers or of H; a rotated part
of a head, whose rest is joined behind it.
Does not match: complex multiplication; a turn the other way; products that are read elsewhere too.
Must run after: `simplify`. Numerics: reassociates.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from passes.axes import Axis, size_of
from passes.graph import Graph
from passes.numerics import Numerics
from passes.ops.rope import rope as rotate
from passes.patterns.driver import apply_rules
from passes.patterns.pattern import Capture, apply
from passes.patterns.pieces import PAIR, Joined, Part
from passes.patterns.rule import Builder, Match, RewriteRule
from passes.result import PassResult
from passes.rewrite import RewriteCounter

_FIRST, _SECOND, _COS, _SIN = Part("x", 0), Part("x", 1), Capture("cos"), Capture("sin")
_PRODUCTS = Joined(
    apply("sub", apply("mul", _FIRST, _COS), apply("mul", _SECOND, _SIN)),
    apply("add", apply("mul", _SECOND, _COS), apply("mul", _FIRST, _SIN)),
)
_TURNED = Joined(apply("neg", _SECOND), _FIRST)
_ROTATED = apply("add", apply("mul", _TURNED, _SIN), apply("mul", Capture("x"), _COS))


def _frequencies(match: Match) -> tuple[tuple[Axis, ...], bool]:
    """The axes of a head outermost first, and whether pairs lie side by side, as the result has it."""
    pair = match.span(PAIR)
    before: tuple[Axis, ...] = ()
    for dim in match.dims:
        axes = match.axes.expand(dim)
        if set(pair) <= set(axes):
            rest = tuple(axis for axis in axes if axis not in pair)
            if not rest:
                return (*before, *pair), True
            return axes, axes[-1:] == pair
        before = axes or before
    raise RuntimeError("a rotation has no pair axis")


def _legality(match: Match) -> str | None:
    pair, own = set(match.span(PAIR)), set(match.axes.flat(match.dims))
    if not pair <= own or set(match.held("x")) != own:
        return "what is rotated has other axes than the result"
    if not set(match.held("cos")) | set(match.held("sin")) <= own:
        return "the angles vary along axes that the result lacks"
    head, _ = _frequencies(match)
    return None if head[0] in pair or head[-1] in pair else "pairs are neither halves nor side by side"


def _build(b: Builder) -> Any:
    match = b.match
    head, is_interleaved = _frequencies(match)
    pair = match.span(PAIR)
    groups = match.rows(head)
    rest = tuple(axis for axis in head if axis not in pair)

    def angles(name: str) -> Any:
        width = head if set(pair) <= set(match.held(name)) else rest
        x = b.array(name, *groups[:-1], width)
        return jnp.broadcast_to(x, (*x.shape[:-1], size_of(width)))

    x = b.array("x", *groups, is_full=True)
    out = rotate(x, angles("cos"), angles("sin"), is_interleaved=is_interleaved, dtype=match.root.dtype)
    return b.result(out, *groups)


RULES = [
    RewriteRule(
        "rope",
        pattern,
        _build,
        Numerics.REASSOCIATES,
        legality=_legality,
        landmarks=(frozenset({"concatenate", "stack"}), marks),
    )
    for pattern, marks in ((_PRODUCTS, frozenset({"mul"})), (_ROTATED, frozenset({"neg"})))
]


def rope(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    return apply_rules(graph, RULES, counter)
