"""The pass `gated_mlp`: an activation times what it gates becomes one operation.

Matches: SiLU, GELU by tanh and by erf, and ReLU, in the spellings of `passes.ops.gated.ACTIVATIONS`, with the factors
in any order and grouping; the constants must be those of a spelling, in the dtype that the program has.
Does not match: an activation that is read elsewhere too; factors that lack some of its axes (a scale is no gate).
Must run after: `simplify`. Numerics: reassociates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from passes import compat
from passes.graph import Graph
from passes.numerics import Numerics
from passes.ops.gated import ACTIVATIONS, gated
from passes.patterns.by_example import by_example
from passes.patterns.driver import apply_rules
from passes.patterns.rule import Builder, Match, RewriteRule
from passes.result import PassResult
from passes.rewrite import RewriteCounter


def _legality(match: Match) -> str | None:
    own = set(match.axes.flat(match.dims))
    if set(match.held("gate")) != own or set(match.held("up")) != own:
        return "the factors have different axes"
    if not compat.is_inexact(match.root.dtype):
        return "the factors are no floats"
    return None


def _rules() -> Iterator[RewriteRule]:
    for activation, spellings in ACTIVATIONS.items():
        for spelling, act in enumerate(spellings):

            def example(gate: Any, up: Any, act: Any = act) -> Any:
                return act(gate) * up

            def build(b: Builder, activation: str = activation, spelling: int = spelling) -> Any:
                match = b.match
                groups = tuple(match.axes.expand(dim) for dim in match.dims)
                gate, up = (b.array(name, *groups, is_full=True) for name in ("gate", "up"))
                dtypes = {"inner_dtype": match.state.dtypes["gate"], "dtype": match.root.dtype}
                return b.result(gated(gate, up, activation=activation, spelling=spelling, **dtypes), *groups)

            kept = compat.CUSTOM_DERIVATIVES if activation == "relu" and spelling == 0 else frozenset[str]()
            pattern = by_example(example, (3, 5), (3, 5), dtype=jnp.float32, keep=kept)
            yield RewriteRule("gated", pattern, build, Numerics.REASSOCIATES, legality=_legality)


@functools.cache
def rules() -> tuple[RewriteRule, ...]:
    """A rule for each spelling; made when first wanted, since the examples are traced."""
    return tuple(_rules())


def gated_mlp(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    return apply_rules(graph, rules(), counter)
