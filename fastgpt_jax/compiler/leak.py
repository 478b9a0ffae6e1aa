"""Names the operation that makes a model not causal, or dependent on the length.

Runs the forward on a prefix and on the whole, or on two continuations of a prefix, keeping every intermediate value,
and walks back from the logits along values whose early rows differ, to an operation whose operands agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from passes import compat, replay
from passes.graph import Graph, Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.time import Times, read_times
from passes.replay import Widening

_WIDE = Widening("float32")
_TOLERANCE = 1e-5


def find_length_dependence(captured: Captured, leaves: Sequence[Any], tokens: np.ndarray, short: int) -> NotServable:
    """Returns the refusal for a forward whose logits of `tokens[:short]` are not the first of those of `tokens`."""
    a, b = captured.graph_at(short), captured.graph_at(len(tokens))
    times = read_times(a, b, short, len(tokens))
    return _refusal(_Comparison(times, short), a, b, [*leaves, tokens[None, :short]], [*leaves, tokens[None]])


def find_leak(
    captured: Captured, leaves: Sequence[Any], tokens: np.ndarray, changed: np.ndarray, at: int
) -> NotServable:
    """Returns the refusal for a forward whose logits before `at` change although only tokens from `at` on do."""
    a, b = captured.graph_at(len(tokens)), captured.graph_at(len(tokens))
    shorter = captured.times.short if captured.times.short < len(tokens) else len(tokens)
    times = read_times(captured.graph_at(shorter), b, shorter, len(tokens))
    return _refusal(_Comparison(times, at), a, b, [*leaves, tokens[None]], [*leaves, changed[None]])


def _refusal(comparison: _Comparison, a: Graph, b: Graph, args_a: list[Any], args_b: list[Any]) -> NotServable:
    times = comparison.times
    op = comparison.frontier(a, b, [jnp.asarray(x) for x in args_a], [jnp.asarray(x) for x in args_b])
    constants = [v for v in (op.operands if op else ()) if any(v is w for w, _ in times.length_dependent)]
    if constants:
        shown = _show(constants[0])
        reason = f"depends on the length of the sequence (through a constant that is {shown} at length {times.long})"
    else:
        reason = "is not causal: early rows of its result change with later tokens or with the length of the sequence"
    return NotServable(reason, op, detail=times.describe(op.results[0]) if op else "the logits")


def _show(value: Value) -> str:
    array = np.asarray(value.const)
    return str(array.item()) if array.size == 1 else f"{array.dtype}{list(array.shape)}"


class _Comparison:
    """Compares two runs row by row up to `early`, in time dimensions of plain length."""

    def __init__(self, times: Times, early: int):
        self.times, self.early = times, early

    def frontier(self, a: Graph, b: Graph, args_a: list[Any], args_b: list[Any]) -> Op | None:
        """The first operation, among those the outputs' difference comes from, whose operands agree."""
        values_a, values_b = _all_values(a, args_a), _all_values(b, args_b)
        order = {op: i for i, op in enumerate(b.ops)}
        pairs = {vb: (va, vb) for va, vb in zip(_values(a), _values(b), strict=True)}

        def differs(vb: Value) -> bool:
            if vb not in pairs:
                return False
            va, _ = pairs[vb]
            return self._differs(vb, values_a[va], values_b[vb])

        found, seen, todo = [], set(), list(b.outputs[:1])
        while todo:
            value = todo.pop()
            if value in seen or value.op is None:
                continue
            seen.add(value)
            guilty = [u for u in value.op.operands if u.const is None and differs(u)]
            if guilty:
                todo += guilty
            else:
                found.append(value.op)
        if not found:
            return None
        op = min(found, key=order.__getitem__)
        inner = self._inside(op, a.ops[order[op]], values_a, values_b)
        return inner or op

    def _differs(self, value: Value, x: Any, y: Any) -> bool:
        if compat.is_extended_dtype(x.dtype):
            return False
        cut = []
        for d, n in enumerate(x.shape):
            extent = self.times.extents.get(value, (None,) * len(x.shape))[d]
            if extent is not None and extent.scale != 1:
                return False
            cut.append(slice(0, min(n, self.early + min(extent.offset, 0))) if extent is not None else slice(None))
        p, q = np.asarray(x[tuple(cut)]), np.asarray(y[tuple(cut)])
        if p.dtype.kind not in "fc":
            return bool((p != q).any())
        # Magnitudes of what differs at all, low ones: masked scores hold huge fills, which would hide all else.
        typical = np.abs(p[np.isfinite(p) & (p != 0) & (p != q)])
        scale = float(np.quantile(typical, 0.25)) if typical.size else 1.0
        return not np.allclose(p, q, rtol=10 * _TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)

    def _inside(self, op: Op, op_a: Op, values_a: dict[Value, Any], values_b: dict[Value, Any]) -> Op | None:
        """Looks into a loop over layers, trip by trip."""
        if op.name != "scan" or op.params["length"] != op_a.params["length"]:
            return None
        body_a, body_b = op_a.regions[0], op.regions[0]
        states = []
        for each, values in ((op_a, values_a), (op, values_b)):
            given = [values[v] if v.const is None else jnp.asarray(v.const) for v in each.operands]
            states.append(replay.split_scan(each, given))
        (consts_a, carry_a, xs_a), (consts_b, carry_b, xs_b) = states
        for i in range(op.params["length"]):
            args_a = [*consts_a, *carry_a, *(x[i] for x in xs_a)]
            args_b = [*consts_b, *carry_b, *(x[i] for x in xs_b)]
            found = self.frontier(body_a, body_b, args_a, args_b)
            if found is not None:
                return found
            carry_a = compat.quick_jit(lambda args: replay.evaluate(body_a, args, _WIDE))(args_a)[: len(carry_a)]
            carry_b = compat.quick_jit(lambda args: replay.evaluate(body_b, args, _WIDE))(args_b)[: len(carry_b)]
        return None


def _values(graph: Graph) -> list[Value]:
    return [*graph.inputs, *(v for op in graph.ops for v in op.results)]


def _all_values(graph: Graph, args: list[Any]) -> dict[Value, Any]:
    keep = _values(graph)

    def run(args: list[Any]) -> list[Any]:
        env = {v: _WIDE.array(x) for v, x in zip(graph.inputs, args, strict=True)}
        for op in graph.ops:
            operands = [_WIDE.array(v.const) if v.const is not None else env[v] for v in op.operands]
            env.update(zip(op.results, replay.apply_op(op, operands, _WIDE), strict=True))
        return [env[v] for v in keep]

    return dict(zip(keep, compat.quick_jit(run)(args), strict=True))
