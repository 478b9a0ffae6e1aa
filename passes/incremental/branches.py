"""Writes `cond` out as its branches and a selection, so that rows and state inside a branch need no rule of their own.

Every branch is computed; a branch that keeps state keeps it in every step, whichever branch is taken.
Matches: `cond` with a result that has a time axis. Does not match: `cond` among parameters and scalars only.
"""

from __future__ import annotations

from jax import lax

from passes import compat
from passes.graph import Graph, Op, Value
from passes.incremental.time import Times
from passes.replay import constant


def inline_branches(graph: Graph, times: Times) -> int:
    """Rewrites in place, in loop bodies too; returns how many `cond`s were written out."""
    ops: list[Op] = []
    replaced: dict[Value, Value] = {}
    count = 0
    for op in graph.ops:
        op.operands = [replaced.get(v, v) for v in op.operands]
        for region in op.regions:
            count += inline_branches(region, times)
        if op.name != "cond" or not any(times.dims(v) for v in op.results):
            ops.append(op)
            continue
        count += 1
        ops += _written_out(op, times, replaced)
    graph.ops = ops
    graph.outputs = [replaced.get(v, v) for v in graph.outputs]
    return count


def _written_out(op: Op, times: Times, replaced: dict[Value, Value]) -> list[Op]:
    index, *operands = op.operands
    ops: list[Op] = []
    outputs: list[list[Value]] = []
    for region in op.regions:
        inner = dict(zip(region.inputs, operands, strict=True))
        for inner_op in region.ops:
            inner_op.operands = [inner.get(v, v) for v in inner_op.operands]
        ops += region.ops
        outputs.append([inner.get(v, v) for v in region.outputs])
    if len(op.regions) == 1:
        replaced.update(zip(op.results, outputs[0], strict=True))
        return ops
    which = index
    if len(op.regions) == 2:
        test = _make(lax.ne_p, [index, constant(0, index.aval)], {}, compat.shaped((), bool), op, times, index)
        ops.append(test)
        which = test.result
    for i, result in enumerate(op.results):
        cases = [branch[i] for branch in outputs]
        select = _make(lax.select_n_p, [which, *cases], {}, result.aval, op, times, result)
        ops.append(select)
        replaced[result] = select.result
    return ops


def _make(primitive, operands: list[Value], params: dict, aval, origin: Op, times: Times, like: Value) -> Op:
    op = Op(primitive, operands, params, [aval], source=origin.source)
    times.short_params[op] = params
    times.extents[op.result] = times.extents.get(like, (None,) * len(op.result.shape))
    if times.is_dependent(like) or any(times.is_dependent(v) for v in operands):
        times.dependent.add(op.result)
    return op
