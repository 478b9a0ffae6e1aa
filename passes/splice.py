"""Puts a traced JAX function into a graph: rewrites are written as ordinary `jnp` and spliced in.

Knows no rewrite. The one idea: a function is traced once for each signature and copied from then on, since a model has
the same operation in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from passes.extract import clone
from passes.graph import Graph, Op, Source, Value
from passes.reader import trace


class Splicer:
    """Copies of traced functions. Invariant: a key stands for one function."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, Graph] = {}

    def splice(
        self, key: Hashable, fn: Callable[..., Any], operands: Sequence[Value], source: Source
    ) -> tuple[list[Op], list[Value]]:
        """The operations of `fn(*operands)` and its flat results, to be put where the operands are defined.

        Args:
          key: Equal for functions that do the same.
          source: The line that the operations are said to come from.
        """
        types = tuple((v.shape, v.dtype) for v in operands)
        if (key, types) not in self._traced:
            self._traced[key, types] = trace(fn, *[jax.ShapeDtypeStruct(*t) for t in types])[0]
        graph = clone(self._traced[key, types])
        graph.replace(dict(zip(graph.inputs, operands, strict=True)))
        for _, op in graph.walk():
            op.source = source
        return graph.ops, graph.outputs
