"""Writes operations of ours, and calls that stayed whole, out as the JAX operations that they stand for.

Widening needs it: what an operation of ours casts inside itself would stay narrow. Numerics: exact.
"""

from __future__ import annotations

import jax

from passes import compat
from passes.graph import Graph
from passes.reader import read_jaxpr
from passes.replay import Widening, abstract_args, evaluate

_EXPANDING = Widening(None, is_expanding=True)


def expand(graph: Graph) -> Graph:
    """A graph of JAX's own operations alone, regions included, that computes the same."""
    made = read_jaxpr(jax.make_jaxpr(lambda *args: evaluate(graph, args, _EXPANDING))(*abstract_args(graph)))
    is_done = all(compat.meaning_of(op.primitive) is None for _, op in made.walk())
    return made if is_done else expand(made)  # one may stand for others
