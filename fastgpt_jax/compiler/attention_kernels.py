"""The implementations of `attention` as candidates of `select`: what each declines, and what it would take.

Knows kernels and no graph. Estimates were measured on two cores of a CPU (jax 0.10.2, float32): docs/log.md. The one
idea: a kernel is told an attention's form (`passes/attention/kernel_form.py`) and nothing of how it was written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from fastgpt_jax.kernels.attention import IMPLEMENTATIONS, AttentionSpec, xla_blocked
from fastgpt_jax.kernels.attention import attention as run_kernel
from passes.attention.expression import Expression
from passes.attention.kernel_form import KernelForm, NoForm, fill_empty, kernel_form
from passes.block_lists import block_list
from passes.graph import Op
from passes.ops.attention import attention_p
from passes.select import PLAIN, Candidate, Target, make_implementation

EXPECTED_FILL = 0.5
"""The share of blocks that are visited of those that numbers of a request may leave out."""


def attend(
    name: str,
    query: Any,
    key: Any,
    value: Any,
    *rest: Any,
    score: Expression,
    out_dtype: Any,
    num_leaves: int,
    **_: Any,
) -> Any:
    """`passes.ops.attention` by a kernel."""
    B, T, N, _H = query.shape
    S = key.shape[1]
    form = kernel_form(score, T, S, has_sinks=len(rest) > num_leaves)
    leaves = form.make_leaves((B, T, N, S), rest[:num_leaves])
    sinks = jnp.broadcast_to(rest[num_leaves].reshape(-1), (N,)) if len(rest) > num_leaves else None
    query, key, value = in_one_dtype(query, key, value, out_dtype)
    out, lse = run_kernel(spec_of(form), query, key, value, leaves, sinks, implementation=name)
    return fill_empty(form, out, lse, value).astype(out_dtype)


def in_one_dtype(query: Any, key: Any, value: Any, out_dtype: Any) -> tuple[Any, Any, Any]:
    """The operands so that nothing is rounded to less than the result or another operand."""
    dtype = functools.reduce(jnp.promote_types, (query.dtype, key.dtype, value.dtype, out_dtype))
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def spec_of(form: KernelForm) -> AttentionSpec:
    return AttentionSpec(form.scale, form.mask, form.soft_cap, form.score)


_KernelCall = tuple[AttentionSpec, Any, Any, Any, list[Any]]


def kernel_call(op: Op) -> _KernelCall | str:
    """What a kernel would be called with, or why it cannot be told."""
    query, key, value, *rest = op.operands
    num_leaves = op.params["num_leaves"]
    (B, T, N, _), S = query.shape, key.shape[1]
    wide = [str(op.params[name]) for name in ("core_dtype", "weight_dtype", "out_dtype")]
    if "float64" in wide or value.dtype == jnp.float64:
        return "kernels compute in float32, and this is float64"
    has_sinks = len(rest) > num_leaves
    if has_sinks and any(size != 1 for size in rest[num_leaves].shape[:2]):
        return f"sinks must be one number a head, got {rest[num_leaves].shape}"
    try:
        form = form_of(op.params["score"], T, S, has_sinks)
    except NoForm as reason:
        return str(reason)
    leaves = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in rest[:num_leaves]]
    made = jax.eval_shape(lambda *leaves: form.make_leaves((B, T, N, S), leaves), *leaves)
    arrays = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (query, key, value)]
    typed = jax.eval_shape(lambda q, k, v: in_one_dtype(q, k, v, op.params["out_dtype"]), *arrays)
    return (spec_of(form), *typed, made)


@functools.lru_cache(maxsize=256)  # a model has the same attention in every layer
def form_of(score: Expression, num_queries: int, num_keys: int, has_sinks: bool) -> KernelForm:
    return kernel_form(score, num_queries, num_keys, has_sinks=has_sinks)


def declines(kernel: ModuleType, platforms: Sequence[str], op: Op, target: Target) -> str | None:
    if platforms and target.platform not in platforms:
        return f"it runs on {' and '.join(platforms)}, and this is for {target.platform}"
    if target.num_devices > 1:
        return f"heads are shared by {target.num_devices} devices, and it knows one"
    call = kernel_call(op)
    if isinstance(call, str):
        return call
    spec, query, key, value, leaves = call
    return kernel.supports(spec, query, key, value, leaves)


def _plain_seconds(op: Op, target: Target) -> float | None:
    if target.platform != "cpu":
        return None
    (B, T, N, H), S, kv_bytes = op.operands[0].shape, op.operands[1].shape[1], _kv_bytes(op)
    # One request's product with a matrix is run as such; those of several are laid out anew first.
    per_byte = 0.12e-9 if B == 1 else 0.7e-9
    return 10e-6 + B * T * N * S * (3.5 + 0.2 * H) * 1e-9 + kv_bytes * per_byte


def _blocked_seconds(op: Op, target: Target) -> float | None:
    call = kernel_call(op)
    if target.platform != "cpu" or isinstance(call, str):
        return None
    spec, (B, T, N, H), S = call[0], op.operands[0].shape, op.operands[1].shape[1]
    block_q, block_k = min(xla_blocked.BLOCK_Q, T), min(xla_blocked.BLOCK_K, S)
    blocks = block_list(spec.mask, T, S, block_q, block_k)
    is_bounded = any(read.by in ("request", "block") for read in blocks.rule.reads)
    pairs = blocks.num_full + blocks.num_partial * (EXPECTED_FILL if is_bounded else 1.0)
    scores, kv_bytes = block_q * block_k * N, _kv_bytes(op) / B / S * block_k
    return 5e-6 + B * (5e-6 + pairs * (4e-6 + scores * (1 + 0.08 * H) * 1e-9 + kv_bytes * 0.45e-9))


def _kv_bytes(op: Op) -> int:
    return op.operands[1].nbytes + op.operands[2].nbytes


def _attention_kernel(
    name: str, *platforms: str, seconds: Callable[[Op, Target], float | None], is_portable: bool
) -> Candidate:
    primitive = make_implementation(attention_p, name, partial(attend, name))
    refuses = partial(declines, IMPLEMENTATIONS[name], platforms)
    return Candidate(name, primitive, refuses, seconds, is_portable)


def _unmeasured(op: Op, target: Target) -> None:
    return None


CANDIDATES = (
    _attention_kernel("pallas_tpu", "tpu", seconds=_unmeasured, is_portable=False),
    _attention_kernel("xla_blocked", "cpu", seconds=_blocked_seconds, is_portable=True),
    Candidate(PLAIN, seconds=_plain_seconds),
)
"""In the order in which they are preferred where nothing was measured."""
