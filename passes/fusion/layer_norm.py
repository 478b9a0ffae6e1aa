"""The pass `layer_norm`: a centred quotient by the standard deviation becomes one operation.

Matches: what `rms_norm` does, over `x - mean(x)`, with the variance as the mean of squares of that or as
`mean(x^2) - mean(x)^2`, held at 0 or not; with or without weight and bias. The result is made in two passes.
Does not match: a variance divided by another number than the size of the axis (`ddof=1`); statistics that are read
elsewhere too; weights or biases that vary along other axes, which stay behind a norm without one.
Must run after: `simplify`; before `rms_norm`, which would take the quotient and leave the mean. Numerics: reassociates.
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
_MEAN = mean_of(_X, "D")
_CENTRED = apply("sub", _X, _MEAN)
_DIFFERENCE = apply("sub", mean_of(power_of(_X, 2), "D"), power_of(_MEAN, 2))
_VARIANCE = mean_of(power_of(_CENTRED, 2), "D") | _DIFFERENCE | apply("max", _DIFFERENCE, Number(0.0))


def _build(b: Builder) -> Any:
    match = b.match
    span = match.span("D")
    groups = match.rows(span)
    vectors = [b.array(name, span, is_full=True) if match.has(name) else None for name in ("weight", "bias")]
    out = norms.layer_norm(
        b.array("x", *groups, is_full=True),
        *vectors,
        eps=match.state.numbers.get("eps", 0.0),
        outer_eps=match.state.numbers.get("outer_eps", 0.0),
        dtype=match.root.dtype,
    )
    return b.result(out, *groups)


RULES = [
    RewriteRule(
        "layer_norm",
        normed(_CENTRED, _VARIANCE, has_weight=has_weight, has_bias=has_bias),
        _build,
        Numerics.REASSOCIATES,
        legality=objection,
        benefit=1 + has_weight + has_bias,
        landmarks=() if has_weight or has_bias else (ROOTS, frozenset({"sub"})),
    )
    for has_weight in (True, False)
    for has_bias in (True, False)
]


def layer_norm(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    return apply_rules(graph, RULES, counter)
