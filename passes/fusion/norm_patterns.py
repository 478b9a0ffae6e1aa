"""What both norms are spelled with: a quotient by a root with its epsilon, weights in any grouping, a bias.

Knows no operation. The one idea: whatever stands inside, `x / (sqrt(square + eps) + outer_eps) * weight + bias` is
matched alike.
"""

from __future__ import annotations

from passes.axes import size_of
from passes.patterns.pattern import Capture, Number, Pattern, apply
from passes.patterns.rule import Match
from passes.patterns.spellings import divided_by_root

ROOTS = frozenset({"rsqrt", "sqrt"})
WEIGHT, BIAS = Capture("weight"), Capture("bias")


def normed(x: Pattern, square: Pattern, *, has_weight: bool, has_bias: bool) -> Pattern:
    """A norm.

    Args:
      x: What is divided.
      square: The mean square that it is divided by.
    """
    root = apply("sqrt", apply("add", square, Number(name="eps")) | square)
    outer = apply("add", root, Number(name="outer_eps"))
    factors, quotient = divided_by_root(x, apply("add", square, Number(name="eps")) | square)
    outer_inverse = apply("div", Number(1.0), outer)
    extra = (WEIGHT,) if has_weight else ()
    pattern: Pattern = apply("mul", factors[0], factors[1] | outer_inverse, *extra)
    whole = quotient | apply("div", x, outer)
    if has_weight:
        weighted = apply("div", apply("mul", x, WEIGHT), root | outer)
        pattern = pattern | apply("mul", whole, WEIGHT) | weighted
    else:
        pattern = pattern | whole
    return apply("add", pattern, BIAS) if has_bias else pattern


def objection(match: Match) -> str | None:
    """Why a weight or bias is none."""
    span = set(match.span("D"))
    for name in ("weight", "bias"):
        if match.has(name):
            held = set(match.held(name))
            if not held and size_of(match.span("D")) > 1:
                return f"the {name} is one number"
            if not held <= span:
                return f"the {name} varies along other axes than the norm's"
    if not span <= set(match.axes.flat(match.dims)):
        return "the normalised axis is not one of the result's"
    return None
