"""The native CPU kernels as implementations of operations of ours: candidates of `select`, and what they want.

Knows the kernels and no graph. The one idea: whether they can be used is one answer for a whole compile, so that
weights are laid out for them once, whatever the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from fastgpt_jax.kernels.cpu import dot, library, pointwise, topk
from passes.graph import Op
from passes.ops.gated import gated_p
from passes.ops.norms import layer_norm_p, rms_norm_p
from passes.ops.quantized_dot import quantized_dot_p
from passes.ops.residual_norm import add_layer_norm_p, add_rms_norm_p
from passes.ops.rope import rope_p
from passes.ops.weight_dot import weight_dot_p
from passes.quantization.packing import XLA
from passes.quantization.schemes import Scheme
from passes.select import Candidate, Instance, Target, make_native_implementation

NAME = "cpu"
PLATFORM = "cpu"
SMALL_CHANNELS = 96
SMALL_ROWS = 8
"""Channels and rows of the instance on which a product is validated: more than any tile of a kernel takes."""
BUDGET = {"float32": 2e-5, "bfloat16": 2e-2}
"""The largest relative error of a result, by dtype: sums of some thousand products, rounded to the result."""
ROUNDED_BUDGET = 2e-2
"""The same where activations are rounded to int8, since one that lies between two numbers may become the other."""


def refusal(target: Target) -> str | None:
    """Why the native kernels do not run what is compiled for a target; None where they do."""
    if target.platform != PLATFORM:
        return f"the native kernels run on {PLATFORM}, and this is for {target.platform}"
    if target.num_devices > 1:
        return f"the native kernels know one device, and {target.num_devices} share the work"
    return library.unusable_reason()


def _budget(op: Op) -> float:
    return max(BUDGET.get(str(v.dtype), 0.0) for v in (op.operands[0], op.results[0]))


def _quantized_budget(op: Op) -> float:
    return _budget(op) if op.params["scheme"].activation is None else ROUNDED_BUDGET


# --------------------------------------------------------------------------------------- products
def refuses_rows(target: Target, x: Any, rows: Any) -> str | None:
    """Why no kernel takes weights in these rows; the number of rows of `x` is no matter."""
    if reason := refusal(target):
        return reason
    if len(rows.shape) != 2:
        return f"kernels take one matrix, and there are {math.prod(rows.shape[:-2])}"
    return dot.weight_dot_refusal(rows.shape[1], rows.shape[0], x.dtype, rows.dtype)


def _weight_dot(x: Any, rows: Any, *, preferred_element_type: Any, **_: Any) -> list[Any]:
    return [dot.weight_dot(x, rows, out_dtype=preferred_element_type)]


def _weight_dot_declines(op: Op, target: Target) -> str | None:
    x, rows = op.operands
    if op.params["num_batch"]:
        return "kernels take one matrix, and this has several"
    return refuses_rows(target, x, rows) or pointwise.refusal(op.result.dtype)


def _quantized_dot(
    x: Any, qvalue: Any, scale: Any, *_: Any, scheme: Scheme, preferred_element_type: Any, **__: Any
) -> list[Any]:
    how = {"activation": scheme.activation, "out_dtype": preferred_element_type}
    if scheme.group_size is not None:
        return [dot.int4_dot(x, qvalue, scale, group_size=scheme.group_size, **how)]
    return [dot.int8_dot(x, qvalue, scale, **how)]


def _quantized_dot_declines(op: Op, target: Target) -> str | None:
    if reason := refusal(target):
        return reason
    x, qvalue, scale = op.operands[:3]
    scheme: Scheme = op.params["scheme"]
    if op.params["num_batch"]:
        return "kernels take one matrix, and this has several"
    if op.params["packing"] is not XLA:
        return f"weights are packed for {op.params['packing'].name}"
    if len(op.operands) > 3:
        return "its float weights are kept for gradients"
    if reason := pointwise.refusal(op.result.dtype):
        return reason
    if scheme.group_size is not None:
        return dot.int4_dot_refusal(x, qvalue, scale, group_size=scheme.group_size, activation=scheme.activation)
    return dot.int8_dot_refusal(x, qvalue, scale, activation=scheme.activation)


def _small_product(op: Op) -> Instance:
    """One row, or some, and few channels; K stays, since it decides how sums are cut."""
    x, *weights = op.operands
    rows = 1 if math.prod(x.shape[:-1]) == 1 else SMALL_ROWS
    small = [jax.ShapeDtypeStruct((rows, x.shape[-1]), x.dtype)]
    small += [jax.ShapeDtypeStruct((min(SMALL_CHANNELS, w.shape[0]), *w.shape[1:]), w.dtype) for w in weights]
    return Instance(small, op.params)


# --------------------------------------------------------------------------------------- rows
def _floats_decline(op: Op, target: Target) -> str | None:
    """The numbers of rows, and those that all rows share, which must be of one dtype."""
    if reason := refusal(target):
        return reason
    shared = op.operands[_num_rows_operands(op) :]
    if len({str(v.dtype) for v in shared}) > 1:
        return f"kernels take vectors of one dtype, and these are {' and '.join(str(v.dtype) for v in shared)}"
    return pointwise.refusal(*(v.dtype for v in (*op.operands, *op.results)))


def _num_rows_operands(op: Op) -> int:
    return 2 if op.name.startswith(("add_", "gated")) else 1


def _rms_norm(x: Any, *weight: Any, eps: float, outer_eps: float, dtype: Any) -> Any:
    how = {"eps": eps, "outer_eps": outer_eps, "dtype": dtype}
    return pointwise.norm(x, None, *weight, has_mean=False, **how)[0]


def _add_rms_norm(x: Any, y: Any, *weight: Any, eps: float, outer_eps: float, dtype: Any) -> list[Any]:
    return pointwise.norm(x, y, *weight, has_mean=False, eps=eps, outer_eps=outer_eps, dtype=dtype)


def _layer_norm(x: Any, *extra: Any, **params: Any) -> Any:
    return _any_layer_norm(x, None, *extra, **params)[0]


def _any_layer_norm(x: Any, y: Any, *extra: Any, has_weight: bool, has_bias: bool, **how: Any) -> list[Any]:
    weight, bias = extra[0] if has_weight else None, extra[-1] if has_bias else None
    return pointwise.norm(x, y, weight, bias, has_mean=True, **how)


def _gated(gate: Any, up: Any, *, activation: str, dtype: Any, **_: Any) -> Any:
    return pointwise.gated(gate, up, activation=activation, dtype=dtype)


def _rope(x: Any, cos: Any, sin: Any, **how: Any) -> Any:
    return pointwise.rope(x, cos, sin, **how)


def _few_rows(op: Op) -> Instance:
    """Rows as they are, and three along each axis that has several: so steps of all sizes share a verdict."""
    first, small = op.operands[0], list[Any]()
    for v in op.operands:
        lead = (min(n, 3) for n in v.shape[:-1]) if v.aval.ndim == first.aval.ndim else ()
        small.append(jax.ShapeDtypeStruct((*lead, v.shape[-1]), v.dtype))
    return Instance(small, op.params)


def _rows_budget(op: Op) -> float:
    """An activation in bfloat16 rounds at every step of its spelling, and a kernel once."""
    return max(BUDGET.get(str(v.dtype), 0.0) for v in (*op.operands, *op.results))


# --------------------------------------------------------------------------------------- sampling
MOST_SORTED = 1024
"""Numbers of a row that the kernel was measured for: 3 to 6 times as fast as XLA, of 32,000."""


def _top_k(x: Any, *, k: int, **_: Any) -> list[Any]:
    return list(topk.top_k(x, k))


def _top_k_declines(op: Op, target: Target) -> str | None:
    if reason := refusal(target):
        return reason
    x, k = op.operands[0], op.params["k"]
    if op.params.get("axis", -1) not in (-1, x.aval.ndim - 1):
        return "it orders the last axis, and this is another"
    if not 1 <= k <= MOST_SORTED:
        return f"it finds up to {MOST_SORTED} numbers of a row, and {k} are wanted"
    return topk.top_k_refusal(x)


def candidate(
    op: Any,
    call: Callable[..., Any],
    declines: Callable[[Op, Target], str | None],
    shrink: Callable[[Op], Instance],
    budget: Callable[[Op], float],
) -> Candidate:
    """A native implementation of `op`."""
    primitive = make_native_implementation(op, NAME, call)
    return Candidate(NAME, primitive, declines, is_portable=False, budget=budget, shrink=shrink)


WEIGHT_DOT = candidate(weight_dot_p, _weight_dot, _weight_dot_declines, _small_product, _budget)
QUANTIZED_DOT = candidate(quantized_dot_p, _quantized_dot, _quantized_dot_declines, _small_product, _quantized_budget)
ROWS = {
    op.name: candidate(op, call, _floats_decline, _few_rows, _rows_budget)
    for op, call in (
        (rms_norm_p, _rms_norm),
        (layer_norm_p, _layer_norm),
        (add_rms_norm_p, _add_rms_norm),
        (add_layer_norm_p, _any_layer_norm),
        (gated_p, _gated),
        (rope_p, _rope),
    )
}
TOP_K = candidate(lax.top_k_p, _top_k, _top_k_declines, _few_rows, _rows_budget)
