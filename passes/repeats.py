"""Finds what a program repeats: runs of operations that occur again and again, as the layers of a model written out do.

Knows nothing of layers. The one idea: operation i and operation i + p are alike for a whole stretch exactly where a
stretch of p operations is repeated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.graph import Graph, Op

_MAX_PERIODS = 64


@dataclass(frozen=True)
class Repeat:
    """`count` copies of `length` items, one behind the other from `start`."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count


def likeness(op: Op) -> Hashable:
    """Equal for operations that a reader would call the same; which values they read does not enter."""
    shapes = tuple((v.shape, str(v.dtype)) for v in (*op.operands, *op.results))
    return op.name, shapes, op.source.frames[:1], len(op.regions)


def num_live(graph: Graph) -> list[int]:
    """For each operation how many values made before it are read by it or later: few where a layer begins."""
    last = {value: i for i, op in enumerate(graph.ops) for value in op.operands}
    last.update((value, len(graph.ops)) for value in graph.outputs)
    change = [0] * (len(graph.ops) + 2)
    for i, op in enumerate(graph.ops):
        for value in op.results:
            if value in last:
                change[i + 1] += 1
                change[last[value] + 1] -= 1
    return list(itertools.accumulate(change[:-2]))


def find_repeats(items: Sequence[Hashable], least: int = 3, live: Sequence[int] = ()) -> list[Repeat]:
    """Repeats that do not overlap, in order; those that save most come first.

    Args:
      least: Items of the shortest stretch that counts.
      live: For each item the cost of cutting before it: of equal repeats the one with the cheapest cuts is taken.
    """
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(item, len(numbers)) for item in items], np.int64)
    is_free = np.ones(len(codes), bool)
    found: list[Repeat] = []
    while (stretch := _best(codes, is_free, least)) is not None:
        best, spare = stretch
        if live:
            cost = [sum(live[best.start + i : best.end + i : best.length]) for i in range(spare + 1)]
            best = replace(best, start=best.start + cost.index(min(cost)))
        found.append(best)
        is_free[best.start : best.end] = False
    return sorted(found, key=lambda repeat: repeat.start)


def _best(codes: np.ndarray, is_free: np.ndarray, least: int) -> tuple[Repeat, int] | None:
    """The repeat that saves most, and by how many items it may be moved on."""
    best: tuple[Repeat, int] | None = None
    for period in _periods(codes, is_free, least):
        alike = (codes[:-period] == codes[period:]) & is_free[:-period] & is_free[period:]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], alike.astype(np.int8), [0]])))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            count, spare = (end - start) // period + 1, (end - start) % period
            if count > 1 and (best is None or period * (count - 1) > best[0].length * (best[0].count - 1)):
                best = Repeat(start, period, count), spare
    return best


def _periods(codes: np.ndarray, is_free: np.ndarray, least: int) -> list[int]:
    """Distances at which equal items lie most often."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for place in np.flatnonzero(is_free).tolist():
        code = int(codes[place])
        if code in last:
            distances[place - last[code]] += 1
        last[code] = place
    return [distance for distance, _ in distances.most_common(_MAX_PERIODS) if distance >= least]
