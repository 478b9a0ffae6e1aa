"""The pass `rms_norm`: a quotient by the root mean square becomes one operation.

Matches: squares, means and roots in any spelling, any axis, weights before or after in any grouping, `1 + weight` as
the weight it is, no weight, casts around and inside, epsilon inside the root, outside it, or none.
Does not match: statistics that are read elsewhere too; a division by another number than the size of the axis; roots of
`max(square, eps)`; weights that vary along other axes, which stay behind a norm without one.
Must run after: `simplify`. Numerics: reassociates.
"""

from __future__ import annotations

from typing import Any

from passes.fusion.norm_patterns import ROOTS, normed, objection
from passes.graph import Graph
from passes.numerics import Numerics
from passes.ops import norms
from passes.patterns.driver import apply_rules
from passes.patterns.pattern import Capture, Number, apply
from passes.patterns.rule import Builder, RewriteRule
from passes.patterns.spellings import mean_of, power_of
from passes.result import PassResult
from passes.rewrite import RewriteCounter

_X = Capture("x")
_DIVIDED = _X | apply("sub", _X, Number(0.0))  # as Flax has it, whose norms all take a mean away
_SQUARE = mean_of(power_of(_X, 2), "D")


def _build(b: Builder) -> Any:
    match = b.match
    span = match.span("D")
    groups = match.rows(span)
    out = norms.rms_norm(
        b.array("x", *groups, is_full=True),
        b.array("weight", span, is_full=True) if match.has("weight") else None,
        eps=match.state.numbers.get("eps", 0.0),
        outer_eps=match.state.numbers.get("outer_eps", 0.0),
        dtype=match.root.dtype,
    )
    return b.result(out, *groups)


RULES = [
    RewriteRule(
        "rms_norm",
        normed(_DIVIDED, _SQUARE, has_weight=has_weight, has_bias=False),
        _build,
        Numerics.REASSOCIATES,
        legality=objection,
        benefit=1 + has_weight,
        landmarks=(ROOTS,) if not has_weight else (),
    )
    for has_weight in (True, False)
]


def rms_norm(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    return apply_rules(graph, RULES, counter)
