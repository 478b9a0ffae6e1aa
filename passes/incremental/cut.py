"""Where to cache: the cheapest set of values from which all wanted rows can be made again, as a minimum cut.

Cost of caching a value: its bytes a token. Cost of making it again for every cached row in every step: the bytes it writes
and its FLOPs. Bytes alone would cache the token ids, FLOPs alone would refuse MLA's latent. A linear map that feeds a
contraction is priced as absorbed into the query (arXiv:2405.04434), at FLOPs only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from passes.graph import Graph, Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.rules.pointwise import SAME
from passes.incremental.time import Times

# Recomputing this many FLOPs costs as much as reading one byte: between a CPU's 10 and a TPU's 240 to 600, on the side that
# caches rather than recomputes unless it saves bytes.
FLOPS_PER_BYTE = 200.0
_FREE = frozenset(
    "reshape broadcast_in_dim transpose squeeze expand_dims convert_element_type slice split concatenate copy name stack tile"
    .split()
) | SAME
_INFINITE = 1e18
# A value that a loop takes from outside is cached once, not once a layer.
_INVARIANT_DISCOUNT = 0.1

_IN, _OUT = 0, 1
_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class CutProblem:
    """What to cut.

    Attributes:
      wanted: Token-dependent values of the graph that are wanted in all rows.
      invariant: Inputs that a loop body takes from outside, the same in each trip.
      pulls_through: Whether a value can be made again from all rows of its operands.
    """

    graph: Graph
    times: Times
    wanted: list[Value]
    invariant: set[Value]
    pulls_through: Callable[[Value], bool]

    def can_be_cut(self, value: Value) -> bool:
        dims = self.times.dims(value)
        if len(dims) != 1:
            return False
        extent = self.times.extent(value, dims[0])
        return extent.scale == 1 and extent.offset <= 0


@dataclass
class _Network:
    capacity: dict[object, dict[object, float]] = field(default_factory=dict)

    def edge(self, a: object, b: object, capacity: float) -> None:
        self.capacity.setdefault(a, {})
        self.capacity.setdefault(b, {})
        self.capacity[a][b] = self.capacity[a].get(b, 0.0) + capacity
        self.capacity[b].setdefault(a, 0.0)

    def reachable(self) -> dict[object, object]:
        """Nodes that the source still reaches, with the node before each; stops at the sink."""
        before: dict[object, object] = {_SOURCE: None}
        queue = deque([_SOURCE])
        while queue and _SINK not in before:
            a = queue.popleft()
            for b, left in self.capacity.get(a, {}).items():
                if left > 1e-9 and b not in before:
                    before[b] = a
                    queue.append(b)
        return before

    def saturate(self) -> dict[object, object]:
        """Pushes flow along shortest paths until none is left; returns the source's side."""
        while True:
            before = self.reachable()
            if _SINK not in before:
                return before
            path, b = [], _SINK
            while before[b] is not None:
                path.append((before[b], b))
                b = before[b]
            flow = min(self.capacity[a][b] for a, b in path)
            if flow >= _INFINITE / 2:
                raise NotServable("keeps something of every pair of tokens, which cannot be cached a token at a time")
            for a, b in path:
                self.capacity[a][b] -= flow
                self.capacity[b][a] += flow


def minimum_cut(problem: CutProblem) -> set[Value]:
    """Chooses the values to cache.

    Returns: Values of the graph, each with one time axis; together they give every wanted value.
    """
    users = problem.graph.users()
    network, seen, todo = _Network(), set(), list(problem.wanted)
    for value in problem.wanted:
        network.edge((value, _OUT), _SINK, _INFINITE)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        (dim, *_) = problem.times.dims(value)
        length = value.shape[dim]
        price = value.nbytes / length * (_INVARIANT_DISCOUNT if value in problem.invariant else 1.0)
        network.edge((value, _IN), (value, _OUT), price if problem.can_be_cut(value) else _INFINITE)
        if value.op is None or not problem.pulls_through(value):
            network.edge(_SOURCE, (value, _IN), _INFINITE)
            continue
        network.edge(_SOURCE, (value, _IN), recompute_cost(value.op, value, users, dim) / length)
        for operand in value.op.operands:
            if problem.times.is_dependent(operand) and problem.times.dims(operand):
                network.edge((operand, _OUT), (value, _IN), _INFINITE)
                todo.append(operand)
    reached = network.saturate()
    return {v for v in seen if (v, _IN) in reached and (v, _OUT) not in reached}


def recompute_cost(op: Op, value: Value, users: dict[Value, list[Op]], time_dim: int) -> float:
    """Bytes-equivalents of making all rows of an operation's result again."""
    size = value.nbytes
    if op.name in _FREE:
        return 0.01 * value.size
    if op.name == "gather":
        return float(size)
    if op.name != "dot_general":
        return 0.25 * value.size
    (contracted, _), _ = op.params["dimension_numbers"]
    depth = math.prod(op.operands[0].shape[d] for d in contracted)
    heads = _absorbing_heads(value, users)
    if heads:
        return 0.5 * size + 2 * depth * max(heads) * value.shape[time_dim] / FLOPS_PER_BYTE
    return 2.0 * size + 2.0 * value.size * depth / FLOPS_PER_BYTE


def _absorbing_heads(value: Value, users: dict[Value, list[Op]]) -> list[int] | None:
    """Batch sizes of the contractions that consume a value through layout alone; None where anything else consumes it."""
    out: list[int] = []
    for op in users.get(value, ()):
        if op.name == "dot_general":
            batch = op.params["dimension_numbers"][1][0]
            out.append(math.prod(op.operands[0].shape[d] for d in batch))
        elif op.name in _FREE:
            inner = _absorbing_heads(op.results[0], users)
            if inner is None:
                return None
            out += inner
        else:
            return None
    return out
