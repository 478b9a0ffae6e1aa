"""Counts FLOPs and bytes of operations and graphs, bodies of loops multiplied out by their trip count.

Conventions: a multiply-add is two FLOPs; an elementwise operation is one per output element, transcendental or not;
data movement is none. Bytes are what an operation reads and writes when nothing is fused; slices, gathers and updates
in place count the elements they touch. Operations of ours cost what their meaning costs, but those on quantized weights
move what is stored (packed numbers and scales) and never the floats that these stand for; their FLOPs are the product's
and those of unpacking and scaling. A `while` runs as often as its counter says; where the number is not known its body
counts once and the cost says so. A `cond` costs the dearest branch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

from passes import compat
from passes.constants import scalar
from passes.graph import Graph, Op, Value
from passes.reader import read_jaxpr, trace
from passes.replay import apply_op

_MOVEMENT = frozenset(
    "bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice "
    "dynamic_update_slice expand_dims gather iota name optimization_barrier pad reshape rev scatter select_n "
    "sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack".split()
)


_STORED_OPERANDS: Mapping[str, int] = MappingProxyType({"quantized_dot": 3, "dequantize": 2})
"""Operations on quantized weights: how many operands they read; the rest is there for gradients alone."""


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes; `is_lower_bound` where a trip count is not known."""

    flops: int = 0
    bytes: int = 0
    is_lower_bound: bool = False

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.is_lower_bound or other.is_lower_bound)

    def times(self, count: int) -> Cost:
        """The cost of doing this `count` times."""
        return Cost(self.flops * count, self.bytes * count, self.is_lower_bound)


def graph_cost(graph: Graph) -> Cost:
    """The cost of running a graph once."""
    return sum((op_cost(op) for op in graph.ops), Cost())


def step_cost(graph: Graph) -> Cost:
    """The cost of each step: of what the inputs with a path, which are parameters, do not alone determine.

    What they do determine is computed once, when parameters are prepared.
    """
    known = {value for value in graph.inputs if value.path is not None}
    total = Cost()
    for op in graph.ops:
        if op.operands and not op.effects and all(v in known or v.const is not None for v in op.operands):
            known.update(op.results)
        else:
            total += op_cost(op)
    return total


def op_cost(op: Op) -> Cost:
    """The cost of one operation with its bodies."""
    if op.name == "scan":
        return graph_cost(op.regions[0]).times(op.params["length"])
    if op.name == "while":
        trips = _trip_count(op)
        once = graph_cost(op.regions[0]) + graph_cost(op.regions[1])
        return once + Cost(is_lower_bound=True) if trips is None else once.times(trips)
    if op.name == "cond":
        return max((graph_cost(region) for region in op.regions), key=lambda cost: (cost.flops, cost.bytes))
    meaning = compat.meaning_of(op.primitive)
    if meaning is not None:
        avals = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in op.operands)
        if op.regions:
            return _cost_of(lambda *args: apply_op(op, args), avals)
        cost = _cost_of_meaning(meaning, tuple(sorted(op.params.items())), avals)
        stored = _STORED_OPERANDS.get(op.name)
        return cost if stored is None else Cost(cost.flops, _moved(op.operands[:stored], op.results))
    called = compat.called_jaxpr(op)
    if called is not None:
        return graph_cost(read_jaxpr(called))
    inner = sum((graph_cost(region) for region in op.regions), Cost())
    return inner + Cost(_flops(op), _bytes(op))


@functools.lru_cache(maxsize=1024)  # a model has the same operation in every layer
def _cost_of_meaning(meaning: Callable[..., Any], params: tuple[tuple[str, Any], ...], avals: tuple[Any, ...]) -> Cost:
    return _cost_of(lambda *args: meaning(*args, **dict(params)), avals)


def _cost_of(fn: Callable[..., Any], avals: tuple[Any, ...]) -> Cost:
    return graph_cost(trace(fn, *avals)[0])


def _flops(op: Op) -> int:
    if op.name in _MOVEMENT:
        return 0
    rule = _FLOPS.get(op.name)
    return rule(op) if rule is not None else sum(result.size for result in op.results)


def _dot_general(op: Op) -> int:
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2 * op.result.size * math.prod(op.operands[0].shape[d] for d in contracted)


def _convolution(op: Op) -> int:
    kernel, numbers = op.operands[1], op.params["dimension_numbers"]
    per_output = kernel.size // kernel.shape[numbers.rhs_spec[0]]
    return 2 * op.result.size * per_output


def _input_elements(op: Op) -> int:
    return op.operands[0].size


def _sort(op: Op) -> int:
    """Comparisons of a merge sort."""
    length = op.operands[0].shape[op.params["dimension"]]
    return op.operands[0].size * max(1, math.ceil(math.log2(max(length, 2))))


def _top_k(op: Op) -> int:
    return op.operands[0].size * max(1, math.ceil(math.log2(max(op.params["k"], 2))))


def _fft(op: Op) -> int:
    points = math.prod(op.params["fft_lengths"])
    return 5 * op.result.size * max(1, math.ceil(math.log2(max(points, 2))))


def _updates(op: Op) -> int:
    return op.operands[2].size


_FLOPS: Mapping[str, Callable[[Op], int]] = MappingProxyType(
    {
        "dot_general": _dot_general,
        "conv_general_dilated": _convolution,
        "sort": _sort,
        "top_k": _top_k,
        "approx_top_k": _input_elements,
        "fft": _fft,
        "scatter_add": _updates,
        "scatter-add": _updates,
        "scatter-mul": _updates,
        "scatter-max": _updates,
        "scatter-min": _updates,
        **{
            f"reduce_{kind}": _input_elements for kind in ("sum", "max", "min", "prod", "and", "or", "xor", "precision")
        },
        "argmax": _input_elements,
        "argmin": _input_elements,
        "reduce": _input_elements,
    }
)


def _bytes(op: Op) -> int:
    touched = _moved((), op.results)
    if op.name in ("slice", "dynamic_slice", "gather"):
        return 2 * touched + _indices_bytes(op, first=1)
    if op.name == "dynamic_update_slice":
        return 2 * op.operands[1].nbytes + _indices_bytes(op, first=2)
    if op.name.startswith("scatter"):
        return 3 * op.operands[2].nbytes + op.operands[1].nbytes
    return _moved(op.operands, op.results)


def _moved(operands: Sequence[Value], results: Sequence[Value]) -> int:
    return sum(value.nbytes for value in (*operands, *results))


def _indices_bytes(op: Op, first: int) -> int:
    return sum(operand.nbytes for operand in op.operands[first:])


def _trip_count(op: Op) -> int | None:
    """How often the body of a `while` runs, where it counts up by a constant to a constant (`lax.fori_loop`)."""
    cond, body = op.regions
    cond_consts = op.params["cond_nconsts"]
    first = cond_consts + op.params["body_nconsts"]
    test = cond.outputs[0].op
    if test is None or test.name not in ("lt", "gt") or test not in cond.ops:
        return None
    counter, limit = test.operands if test.name == "lt" else test.operands[::-1]
    if counter not in cond.inputs[cond_consts:]:
        return None
    number = cond.inputs.index(counter) - cond_consts
    start = scalar(op.operands[first + number])
    stop = _known(limit, cond, op.operands[:cond_consts])
    step = _increment(body, number, op.params["body_nconsts"])
    if start is None or stop is None or step is None or step <= 0:
        return None
    return max(0, -(-(int(stop) - int(start)) // step))


def _known(value: Value, cond: Graph, consts: list[Value]) -> int | None:
    """A scalar that the condition sees as a constant; a carry is not one, even when it starts as one."""
    if value in cond.inputs[: len(consts)]:
        value = consts[cond.inputs.index(value)]
    known = scalar(value)
    return None if known is None else int(known)


def _increment(body: Graph, number: int, consts: int) -> int | None:
    """By how much carry `number` grows in the body, where that is a constant."""
    made, counter = body.outputs[number].op, body.inputs[consts + number]
    if made is None or made.name != "add" or counter not in made.operands:
        return None
    other = scalar(made.operands[1] if made.operands[0] is counter else made.operands[0])
    return None if other is None else int(other)
