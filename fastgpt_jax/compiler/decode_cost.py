"""What a decode step costs beside one more token of the forward: counted, so that nothing is made again in hiding."""

from __future__ import annotations

import jax
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from fastgpt_jax.compiler.program import Program
from fastgpt_jax.compiler.trial_run import one_request
from passes.cost import op_cost
from passes.graph import Graph
from passes.incremental.errors import NotServable
from passes.incremental.expansion import expansion_flops
from passes.incremental.time import Times
from passes.reader import trace

MAX_DECODE_RATIO = 1.2


def check_flops(decode: int, one_more: int, expansion: int) -> None:
    if decode - expansion > MAX_DECODE_RATIO * one_more:
        raise NotServable(
            f"a decode step would cost {decode:,} FLOPs where one more token costs the forward {one_more:,}: "
            "something is computed again for every cached token"
        )


def count_flops(captured: Captured, program: Program) -> tuple[int, int, int]:
    """FLOPs of a decode step, of one more token in the forward, and of expanding cached latents."""
    state = jax.eval_shape(program.init_state)
    leaves = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in captured.graph.inputs[:-1]]
    graph, _ = trace(
        lambda p, s, i: program.logits(p, s, i, last_row=False),
        leaves,
        state,
        one_request(program, np.zeros(1, np.int32), 1, 0),
    )
    decode = _flops(graph) - _flops_of_parameters(captured.graph, captured.times)
    return decode, _flops_of_one_more(captured), expansion_flops(program.plan)


def _flops_of_one_more(captured: Captured) -> int:
    """FLOPs of the forward at capacity beyond those of a sequence one token shorter."""
    capacity = captured.capacity
    longest = _flops(captured.graph)
    for length in (*(capacity - n for n in (1, 2, 4, 8, 16, 32)), captured.times.short):
        if 0 < length < capacity:
            try:
                return (longest - _flops(captured.graph_at(length))) // (capacity - length)
            except Exception:
                continue
    return (
        2 * longest // capacity
    )  # one length only: FLOPs grow at most with its square, the last token at most twice the mean


def _flops_of_parameters(graph: Graph, times: Times) -> int:
    """FLOPs on values that neither time nor tokens enter; in a loop over time everything is of one token."""
    total = 0
    for op in graph.ops:
        if op.name == "scan" and op.regions[0].ops:
            if not times.moves(op, "length"):
                total += op.params["length"] * _flops_of_parameters(op.regions[0], times)
        elif not any(times.dims(v) or times.is_dependent(v) for v in (*op.operands, *op.results)):
            total += op_cost(op).flops
    return total


def _flops(graph: Graph) -> int:
    """FLOPs of a graph with every branch of a `cond` counted, since a step computes them all."""
    total = 0
    for op in graph.ops:
        if op.name == "scan":
            total += op.params["length"] * _flops(op.regions[0])
        elif op.name == "cond":
            total += sum(map(_flops, op.regions))
        else:
            total += op_cost(op).flops
    return total
