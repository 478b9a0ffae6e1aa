"""The cheapest set of vertices that separates sources from sinks in a directed graph (max-flow, min-cut).

Knows no program. Each vertex is split into an entry and an exit joined by an edge of its weight; edges between vertices
cannot be cut. Flow is pushed level by level (Dinic's algorithm).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from itertools import pairwise
from typing import TypeVar

V = TypeVar("V", bound=Hashable)
_SOURCE, _SINK = -1, -2


def min_vertex_cut(
    weights: Mapping[V, int], edges: Iterable[tuple[V, V]], sources: Iterable[V], sinks: Iterable[V]
) -> set[V]:
    """The vertices of a minimum cut, of all such cuts the one nearest the sinks.

    Args:
      weights: Each vertex with its weight, not negative.
      edges: Pairs (from, to) of vertices.
      sources: Where paths begin; a source may be cut itself.
      sinks: Where paths end; a sink may be cut itself.
    """
    number = {vertex: i for i, vertex in enumerate(weights)}
    infinite = sum(weights.values()) + 1
    capacity: dict[int, dict[int, int]] = {}

    def connect(a: int, b: int, room: int) -> None:
        capacity.setdefault(a, {})[b] = room
        capacity.setdefault(b, {}).setdefault(a, 0)

    for vertex, weight in weights.items():
        connect(2 * number[vertex], 2 * number[vertex] + 1, weight)
    for a, b in edges:
        connect(2 * number[a] + 1, 2 * number[b], infinite)
    for vertex in sources:
        connect(_SOURCE, 2 * number[vertex], infinite)
    for vertex in sinks:
        connect(2 * number[vertex] + 1, _SINK, infinite)
    _saturate(capacity)
    near_sink = _reaching_sink(capacity)
    return {vertex for vertex, i in number.items() if 2 * i + 1 in near_sink and 2 * i not in near_sink}


def _saturate(capacity: dict[int, dict[int, int]]) -> None:
    """Pushes flow from source to sink until no path has room."""
    while (level := _levels(capacity)) is not None:
        unexplored = {node: list(edges) for node, edges in capacity.items()}
        while path := _path(capacity, level, unexplored):
            room = min(capacity[a][b] for a, b in path)
            for a, b in path:
                capacity[a][b] -= room
                capacity[b][a] += room


def _levels(capacity: Mapping[int, Mapping[int, int]]) -> dict[int, int] | None:
    """Each node's distance from the source along edges with room; None when the sink is out of reach."""
    level, queue = {_SOURCE: 0}, deque([_SOURCE])
    while queue:
        node = queue.popleft()
        for other, room in capacity.get(node, {}).items():
            if room and other not in level:
                level[other] = level[node] + 1
                queue.append(other)
    return level if _SINK in level else None


def _path(
    capacity: Mapping[int, Mapping[int, int]], level: Mapping[int, int], unexplored: dict[int, list[int]]
) -> list[tuple[int, int]]:
    """A path with room that climbs a level an edge, as edges; empty when there is none left.

    An edge that leads nowhere is dropped from `unexplored` and not tried again at these levels.
    """
    path = [_SOURCE]
    while path[-1] != _SINK:
        node = path[-1]
        edges = unexplored.get(node, [])
        while edges and not (capacity[node][edges[-1]] and level.get(edges[-1]) == level[node] + 1):
            edges.pop()
        if edges:
            path.append(edges[-1])
        elif node == _SOURCE:
            return []
        else:
            path.pop()
            unexplored[path[-1]].pop()
    return list(pairwise(path))


def _reaching_sink(capacity: Mapping[int, Mapping[int, int]]) -> set[int]:
    """The nodes from which the sink can still be reached."""
    seen, queue = {_SINK}, deque([_SINK])
    while queue:
        node = queue.popleft()
        for other in capacity.get(node, {}):
            if capacity[other][node] and other not in seen:
                seen.add(other)
                queue.append(other)
    return seen
