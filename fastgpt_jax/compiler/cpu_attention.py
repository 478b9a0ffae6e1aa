"""The native attention of CPUs as candidates of `select`: over pages of a cache, and over what was read of them.

Knows the kernels and no graph. The one idea: what a kernel is told is what every kernel of attention is told, and what
it is validated on is a step that the engine could make: rows at the end of what is there, each request with pages of
its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler import attention_kernels
from fastgpt_jax.compiler.attention_kernels import form_of, spec_of
from fastgpt_jax.compiler.cpu_kernels import BUDGET, NAME, candidate, refusal
from fastgpt_jax.kernels.cpu import attention as native
from passes.attention.expression import Expression
from passes.attention.kernel_form import KernelForm, NoForm, sees_itself
from passes.graph import Op
from passes.masks import Shifted
from passes.ops.attention import attention_p
from passes.ops.paged_attention import Operands, paged_attention_p
from passes.select import Instance, Target

SMALL_REQUESTS, SMALL_QUERIES, SMALL_KEYS = 2, 24, 96
"""Sizes of the instance on which attention is validated: some blocks of a kernel in each direction."""


def _budget(op: Op) -> float:
    return max(BUDGET[str(v.dtype)] for v in (op.operands[0], op.results[0]) if str(v.dtype) in BUDGET)


# --------------------------------------------------------------------------------------- what was read
def _attend(*operands: Any, **params: Any) -> Any:
    return attention_kernels.attend(NAME, *operands, **params)


def _declines(op: Op, target: Target) -> str | None:
    if reason := refusal(target):
        return reason
    call = attention_kernels.kernel_call(op)
    if isinstance(call, str):
        return call
    spec, query, key, value, leaves = call
    return native.supports(spec, query, key, value, leaves)


def _small(op: Op) -> Instance:
    """Fewer requests, queries and keys, the last ones of each."""
    (B, T), S = op.operands[0].shape[:2], op.operands[1].shape[1]
    small = {"B": min(B, SMALL_REQUESTS), "T": min(T, SMALL_QUERIES), "S": min(S, SMALL_KEYS)}
    num_leaves = op.params["num_leaves"]
    query, key, value, *rest = op.operands
    shapes = [(small["B"], small["T"], *query.shape[2:])]
    shapes += [(small["B"], small["S"], *v.shape[2:]) for v in (key, value)]
    operands = [jax.ShapeDtypeStruct(s, v.dtype) for s, v in zip(shapes, (query, key, value), strict=True)]
    operands += [_small_leaf(v, small, max(0, small["S"] - small["T"])) for v in rest[:num_leaves]]
    operands += [_small_leaf(v, small, 0) for v in rest[num_leaves:]]
    return Instance(operands, op.params)


def _small_leaf(leaf: Any, small: dict[str, int], start: int) -> Any:
    """A leaf cut to small sizes; one whole number for a request is where its queries begin."""
    sizes = (small["B"], small["T"], leaf.shape[2] if leaf.aval.ndim > 2 else 1, small["S"])
    shape = tuple(1 if old == 1 else new for old, new in zip(leaf.shape, sizes, strict=False))
    if jnp.issubdtype(leaf.dtype, jnp.integer) and math.prod(leaf.shape[1:]) == 1:
        return np.full(shape, start, leaf.dtype)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


# --------------------------------------------------------------------------------------- pages
def _attend_pages(
    *flat: Any,
    num_layers: int,
    num_leaves: int,
    has_scales: bool,
    num_keys: int,
    num_kv_heads: int,
    score: Expression,
    out_dtype: Any,
    **_: Any,
) -> list[Any]:
    given = Operands.of(flat, num_layers=num_layers, num_leaves=num_leaves, has_scales=has_scales)
    (R, T, N, _H), K = given.query.shape, num_kv_heads
    form = form_of(score, T, num_keys, has_sinks=bool(given.sinks))
    rows = [x.reshape(R, T, K, -1) for x in (given.rows_k, given.rows_v)]
    scales = None
    if has_scales:
        pool_k, rows_k, pool_v, rows_v = given.scales
        scales = native.Scales(rows_k.reshape(R, T, K), rows_v.reshape(R, T, K), pool_k, pool_v)
    out, *pools = native.paged_attention(
        spec_of(form),
        given.query,
        rows[0],
        rows[1],
        given.positions,
        given.pages,
        given.pool_k,
        given.pool_v,
        given.layers,
        num_keys=num_keys,
        leaves=form.make_leaves((R, T, N, num_keys), given.leaves),
        sinks=jnp.broadcast_to(given.sinks[0].reshape(-1), (N,)) if given.sinks else None,
        scales=scales,
    )
    return [out.astype(out_dtype), *pools]


def _pages_decline(op: Op, target: Target) -> str | None:
    if reason := refusal(target):
        return reason
    if not op.params["sees_written_only"]:
        return "a query is not known to see only rows that are written, and the kernel reads no other"
    given = _operands(op)
    form = _form(op, given)
    if isinstance(form, str):
        return form
    first = len(given.layers) + 2
    pools = [
        jax.ShapeDtypeStruct((*x.shape[:first], K, math.prod(x.shape[first:]) // K), x.dtype)
        for x, K in ((given.pool_k, op.params["num_kv_heads"]), (given.pool_v, op.params["num_kv_heads"]))
    ]
    return native.paged_attention_refusal(spec_of(form), given.query, *pools, num_keys=op.params["num_keys"])


def _operands(op: Op) -> Operands:
    counts = {name: op.params[name] for name in ("num_layers", "num_leaves", "has_scales")}
    return Operands.of(op.operands, **counts)


def _form(op: Op, given: Operands) -> KernelForm | str:
    """The form, or why it cannot be told."""
    if any(size != 1 for sinks in given.sinks for size in sinks.shape[:2]):
        return f"sinks must be one number a head, got {given.sinks[0].shape}"
    try:
        form = form_of(op.params["score"], given.query.shape[1], op.params["num_keys"], has_sinks=bool(given.sinks))
    except NoForm as reason:
        return str(reason)
    is_own_seen = isinstance(form.mask, Shifted) and sees_itself(form.mask.mask)
    is_known = form.empty != "mean" or is_own_seen  # the row of a query is there before it reads
    return form if is_known else "a query may see no key, and then gives the mean of all values"


def _small_pages(op: Op) -> Instance:
    """Few requests that have just written their last rows, on pages of their own in turned order."""
    given, T = _operands(op), op.operands[0].shape[1]
    first, Z = len(given.layers) + 2, given.pool_k.shape[len(given.layers) + 1]
    num_keys = op.params["num_keys"]
    small = {"B": SMALL_REQUESTS, "T": 1 if T == 1 else min(num_keys, SMALL_QUERIES), "S": min(num_keys, SMALL_KEYS)}
    pages_each, start = -(-small["S"] // Z), small["S"] - small["T"]
    num_pages = small["B"] * pages_each

    def shaped(x: Any, *lead: int, after: int) -> Any:
        return jax.ShapeDtypeStruct((*lead, *x.shape[after:]), x.dtype)

    def pool(x: Any) -> Any:
        return shaped(x, *x.shape[: first - 2], num_pages, Z, after=first)

    positions = np.broadcast_to(np.arange(start, small["S"], dtype=np.int32), (small["B"], small["T"])).copy()
    operands = dataclasses.replace(
        given,
        query=shaped(given.query, small["B"], small["T"], after=2),
        pool_k=pool(given.pool_k),
        rows_k=shaped(given.rows_k, small["B"], small["T"], after=2),
        pool_v=pool(given.pool_v),
        rows_v=shaped(given.rows_v, small["B"], small["T"], after=2),
        positions=positions,
        pages=np.arange(num_pages, dtype=np.int32)[::-1].reshape(small["B"], pages_each).copy(),
        lengths=np.full(small["B"], small["S"], np.int32),
        scales=tuple(
            pool(x) if i % 2 == 0 else shaped(x, small["B"], small["T"], after=2) for i, x in enumerate(given.scales)
        ),
        layers=tuple(np.zeros((), np.int32) for _ in given.layers),
        leaves=tuple(_small_leaf(v, small, start) for v in given.leaves),
        sinks=tuple(_small_leaf(v, small, 0) for v in given.sinks),
    )
    return Instance(operands.flat, {**op.params, "num_keys": small["S"]})


ATTENTION = candidate(attention_p, _attend, _declines, _small, _budget)
PAGED_ATTENTION = candidate(paged_attention_p, _attend_pages, _pages_decline, _small_pages, _budget)
