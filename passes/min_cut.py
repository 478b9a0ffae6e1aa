"""The cheapest set of vertices that separates sources from sinks in a directed graph (max-flow, min-cut).

Knows no program. Each vertex is split into an entry and an exit joined by an edge of its weight; edges between vertices
cannot be cut. Augmenting paths are found breadth first (Edmonds and Karp, doi:10.1145/321694.321699).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
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
    while path := _augmenting_path(capacity):
        room = min(capacity[a][b] for a, b in path)
        for a, b in path:
            capacity[a][b] -= room
            capacity[b][a] += room
    near_sink = _reaching_sink(capacity)
    return {vertex for vertex, i in number.items() if 2 * i + 1 in near_sink and 2 * i not in near_sink}


def _augmenting_path(capacity: Mapping[int, Mapping[int, int]]) -> list[tuple[int, int]]:
    """A shortest path with room from the source to the sink, as edges; empty when there is none."""
    came_from, queue = {_SOURCE: _SOURCE}, deque([_SOURCE])
    while queue and _SINK not in came_from:
        node = queue.popleft()
        for other, room in capacity.get(node, {}).items():
            if room and other not in came_from:
                came_from[other] = node
                queue.append(other)
    path, node = [], _SINK
    while node in came_from and node != _SOURCE:
        path.append((came_from[node], node))
        node = came_from[node]
    return path


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
