"""Where to cache: the cheapest set of values from which all wanted rows can be made again, as a minimum cut.

Cost of caching a value: its bytes a token. Cost of making it again for every cached row in every step: the bytes it
writes and its FLOPs. Bytes alone would cache the token ids, FLOPs alone would refuse MLA's latent. A linear map that
feeds a contraction, and at least doubles its input as MLA's up-projections do, is priced as absorbed into the query
(arXiv:2405.04434): at FLOPs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from passes.graph import Graph, Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.rules.pointwise import SAME
from passes.incremental.time import Times
from passes.min_cut import min_vertex_cut

# Recomputing this many FLOPs costs as much as reading one byte: between a CPU's 10 and a TPU's 240 to 600, so that
# values are cached rather than made again unless that saves bytes.
FLOPS_PER_BYTE = 200.0
_LAYOUT = "reshape broadcast_in_dim transpose squeeze expand_dims slice split concatenate stack unstack tile"
_FREE = frozenset((*_LAYOUT.split(), "convert_element_type", "copy", "name")) | SAME
_NEVER = 10**18
# A value that a loop takes from outside is cached once, not once a layer.
_INVARIANT_DISCOUNT = 0.1


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


@dataclass(frozen=True)
class _Remake:
    """The choice to make a value again instead of caching it: a vertex in front of the value's own."""

    value: Value


def minimum_cut(problem: CutProblem) -> set[Value]:
    """Chooses the values to cache.

    Returns: Values of the graph, each with one time axis; together they give every wanted value.

    Raises:
      NotServable: a wanted value can neither be cached a token at a time nor be made from others that can.
    """
    users = problem.graph.users()
    weights: dict[Value | _Remake, int] = {}
    edges: list[tuple[Value | _Remake, Value | _Remake]] = []
    todo = list(problem.wanted)
    while todo:
        value = todo.pop()
        if value in weights:
            continue
        (dim, *_) = problem.times.dims(value)
        length = value.shape[dim]
        discount = _INVARIANT_DISCOUNT if value in problem.invariant else 1.0
        price = value.nbytes / length * discount
        weights[value] = _units(price) if problem.times.has_own_rows(value) else _NEVER
        edges.append((_Remake(value), value))
        if value.op is None or not problem.pulls_through(value):
            weights[_Remake(value)] = _NEVER
            continue
        weights[_Remake(value)] = _units(recompute_cost(value.op, value, users, dim) / length)
        for operand in value.op.operands:
            if problem.times.is_dependent(operand) and problem.times.dims(operand):
                edges.append((operand, value))
                todo.append(operand)
    sources = [v for v in weights if isinstance(v, _Remake)]
    cut = min_vertex_cut(weights, edges, sources, problem.wanted)
    for vertex in cut:
        if weights[vertex] >= _NEVER:
            value = vertex.value if isinstance(vertex, _Remake) else vertex
            raise NotServable(
                "keeps something of every pair of tokens, which cannot be cached a token at a time", value.op
            )
    return {v for v in cut if isinstance(v, Value)}


def _units(cost: float) -> int:
    """Costs as integers, in thousandths of a byte."""
    return math.ceil(cost * 1000)


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
    if is_expansion(op, value, users, time_dim):
        heads = max(_absorbing_heads(value, users) or [1])
        return 0.5 * size + 2 * depth * heads * value.shape[time_dim] / FLOPS_PER_BYTE
    return 2.0 * size + 2.0 * value.size * depth / FLOPS_PER_BYTE


def is_expansion(op: Op, value: Value, users: dict[Value, list[Op]], time_dim: int) -> bool:
    """Whether a product at least doubles its rows and only contractions read them, so that a query can absorb it."""
    if op.name != "dot_general" or not _absorbing_heads(value, users):
        return False
    (contracted, _), _ = op.params["dimension_numbers"]
    depth = math.prod(op.operands[0].shape[d] for d in contracted)
    return value.size >= 2 * depth * value.shape[time_dim]


def _absorbing_heads(value: Value, users: dict[Value, list[Op]]) -> list[int] | None:
    """Batch sizes of the contractions that consume a value through layout alone; None if others do."""
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
