"""The attention operations of a program as layers, numbered in the order in which the program runs them.

An operation in the body of a loop is as many layers as the loop has iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passes.graph import Graph, Op


@dataclass(frozen=True, eq=False)
class AttentionLayers:
    """One attention operation.

    Attributes:
      graph: The graph or region that it stands in.
      layers: The numbers of the layers that it is.
    """

    graph: Graph
    op: Op
    layers: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.op.operands[0].shape[2]

    @property
    def layer_text(self) -> str:
        """Such as `layer 3` or `layers 0 to 7`."""
        return numbers_text("layer", self.layers)


def numbers_text(name: str, numbers: Sequence[int]) -> str:
    """Such as `layer 3`, `layers 0 to 7` or `layers 0, 2 to 4`; numbers ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
    return f"{name}{'' if len(numbers) == 1 else 's'} {text}"


def find_layers(graph: Graph) -> tuple[AttentionLayers, ...]:
    """All attention operations, loop bodies included, in order."""
    return _number(graph)[0]


def _number(graph: Graph) -> tuple[tuple[AttentionLayers, ...], int]:
    """The operations of a graph numbered from 0, and how many layers they are."""
    found: list[AttentionLayers] = []
    total = 0
    for op in graph.ops:
        if op.name == "attention":
            found.append(AttentionLayers(graph, op, (total,)))
            total += 1
            continue
        times = op.params["length"] if op.name == "scan" else 1
        size = 0  # of one iteration; of the branches of a condition one runs
        for region in op.regions:
            inner, num_layers = _number(region)
            size = max(size, num_layers)
            for item in inner:
                numbers = tuple(total + i * num_layers + n for i in range(times) for n in item.layers)
                found.append(AttentionLayers(item.graph, item.op, numbers))
        total += times * size
    return tuple(found), total
