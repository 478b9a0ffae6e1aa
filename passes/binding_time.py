"""Splits a program by when values can be known: `prepare(params) -> packed` runs once, `step(packed, ...)` each time.

What parameters and constants alone determine is *static*. Static values that the rest of the program reads must cross
from `prepare` to `step`, or be made again in `step` from others that cross. The one idea: the cheapest set in bytes is
a minimum vertex cut of the static part, between the parameters and the readers. Among equal cuts it takes the one
nearest the readers, so work that does not enlarge its input is done once; a value larger than what it is made of (a
dequantized weight, a repeated head) is made in `step`. What constants alone determine costs no bytes to make again, so
it never crosses. What is marked `stored` crosses, or what is made of it does: nothing above it is used in its stead.

Matches: pure operations, region operations as a whole. Does not match: operations with effects; loops whose carries
depend on the other arguments, whose bodies are not split. Must run after: `simplify`. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passes.extract import extract
from passes.graph import Graph, Value
from passes.min_cut import min_vertex_cut
from passes.ops.stored import stored_p


@dataclass(frozen=True)
class Split:
    """A program in two parts.

    Attributes:
      prepare: Static inputs to the values that cross.
      step: The values that cross, in that order, then the other inputs, to the outputs of the program.
    """

    prepare: Graph
    step: Graph

    @property
    def packed_bytes(self) -> int:
        """Bytes of the values that cross; but for what is `stored`, never more than those of the static inputs."""
        return sum(value.nbytes for value in self.prepare.outputs)


def split(graph: Graph, is_static: Sequence[bool]) -> Split:
    """Splits a graph, which stays as it is.

    Args:
      is_static: For each input whether it is known when `prepare` runs.
    """
    static_inputs = [v for v, known in zip(graph.inputs, is_static, strict=True) if known]
    other_inputs = [v for v, known in zip(graph.inputs, is_static, strict=True) if not known]
    crossing = _crossing(graph, static_inputs)
    prepare = extract(graph, static_inputs, crossing)
    step = extract(graph, crossing + other_inputs, graph.outputs, with_effects=True)
    return Split(prepare, step)


def _crossing(graph: Graph, static_inputs: Sequence[Value]) -> list[Value]:
    """The values that cross, in the order in which the program makes them."""
    static, edges = set(static_inputs), []
    demanded: set[Value] = set()
    known, kept = set(static_inputs), []
    for op in graph.ops:
        from_static = [v for v in op.operands if v in static]
        if not op.effects and all(v in known or v.const is not None for v in op.operands):
            known.update(op.results)
            if from_static:
                static.update(op.results)
                if op.primitive is stored_p:
                    kept.extend(op.results)
                    continue
                edges += [(v, result) for v in from_static for result in op.results]
        else:
            demanded.update(from_static)
    demanded.update(v for v in graph.outputs if v in static)
    order = [*static_inputs, *(result for op in graph.ops for result in op.results)]
    vertices = {v: v.nbytes for v in order if v in static}
    cut = min_vertex_cut(vertices, edges, [*static_inputs, *kept], demanded)
    return [v for v in order if v in cut]
