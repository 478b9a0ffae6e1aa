"""Incremental rules: how the rows wanted of an operation's result are made from rows of its operands.

A rule is a pure function `Site -> Recipe`. `RULES` maps primitive names to rules; it is the whole of what the
derivation knows about operations, loops excepted (`passes.incremental.walk`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from passes.incremental.plan import Recipe
from passes.incremental.rules import contraction, convolution, cumulative, layout, lookup, movement, pointwise
from passes.incremental.site import Site

Rule = Callable[[Site], Recipe]

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **pointwise.RULES,
        **layout.RULES,
        **movement.RULES,
        **contraction.RULES,
        **convolution.RULES,
        **lookup.RULES,
        **cumulative.RULES,
    }
)

# A delayed row passes through these to their operand; anything else keeps a window of its own last rows.
DELAY_PASSES = frozenset({*layout.RULES, *movement.RULES, *pointwise.SAME}) - {"iota"}
POINTWISE = pointwise.POINTWISE
