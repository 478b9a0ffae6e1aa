"""Attention on CPUs: over pages, into which the step's own rows are written in place, and on contiguous views.

Knows what the native kernels are told and what they decline; how they compute is written in `native/attention*.h`. The
one idea: the mask travels as a small program in postfix order, and its run-time leaves as operands, so that one kernel
serves every mask of the algebra and spends time on visible keys alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastgpt_jax.kernels.attention.spec import AttentionSpec, Keys, Queries, Result, Sinks, Values, check, over_requests
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.attention_mask import UnknownMask, mask_program
from passes.attention.expression import Index, evaluate, walk
from passes.masks import Read
from passes.scores import Alibi, Biased

MAX_GROUP = 96
MAX_HEAD = 1024
MAX_BIAS_BYTES = 64 * 1024 * 1024
"""Of a bias, which is made as an array before the kernel runs."""

_ROLES = {"head": "n", "query": "t", "key": "s", "request": "", "block": "ts", "head_key": "ns", "head_pair": "tns"}


def supports(spec: AttentionSpec, query: Any, key: Any, value: Any, leaves: Sequence[Any] = ()) -> str | None:
    """Why these arguments of `attend` are declined; None where they are taken."""
    sizes = _Sizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2], key.shape[1])
    dtypes = (query.dtype, key.dtype, value.dtype)
    return library.unusable_reason() or _declined(spec, sizes, dtypes, (key.shape[3], value.shape[3]))


def paged_attention_refusal(spec: AttentionSpec, query: Any, pool_k: Any, pool_v: Any, *, num_keys: int) -> str | None:
    """Why these arguments of `paged_attention` are declined, by shapes and dtypes; None where they are taken."""
    sizes = _Sizes(query.shape[0], query.shape[1], query.shape[2], pool_k.shape[-2], num_keys)
    dtypes = (query.dtype, pool_k.dtype, pool_v.dtype)
    return library.unusable_reason() or _declined(spec, sizes, dtypes, (pool_k.shape[-1], pool_v.shape[-1]), paged=True)


def attend(
    spec: AttentionSpec,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
) -> Result:
    """Attends; see `fastgpt_jax.kernels.attention.spec`.

    Raises:
      NotImplementedError: `supports` declines.
    """
    check(spec, query, key, value, leaves, sinks)
    if reason := supports(spec, query, key, value, leaves):
        raise NotImplementedError(f"the native CPU kernel declines: {reason}")
    B, T, N, _ = query.shape
    told = _told(spec, leaves, sinks, _Sizes(B, T, N, key.shape[2], key.shape[1]))
    results = (
        jax.ShapeDtypeStruct((B, T, N, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    call = jax.ffi.ffi_call("fastgpt_attention", results, vmap_method="sequential")
    out, lse = call(query, key, value, *told.operands, **told.attributes)
    return out, lse


class Scales(NamedTuple):
    """Scales of int8 rows and pools, bfloat16."""

    rows_k: Any
    rows_v: Any
    pool_k: Any
    pool_v: Any


def paged_attention(
    spec: AttentionSpec,
    query: Float[Array, "R T N H"],
    rows_k: Any,
    rows_v: Any,
    positions: Int[Array, "R T"],
    pages: Int[Array, "R M"],
    pool_k: Any,
    pool_v: Any,
    layers: Sequence[Any] = (),
    *,
    num_keys: int,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
    scales: Scales | None = None,
) -> tuple[Array, ...]:
    """Writes the rows of a step into the pools, then attends to the rows of each request where they lie.

        pool[layers, pages[r, p // Z], p % Z] = rows[r, t]     p = positions[r, t], of keys and of values, for all first
        out[r, t] = attention of query[r, t] over the rows of request r at the positions s < num_keys

    Query t of the mask is query t of the request. A query whose position lies outside the pages of its request is
    padding: its rows are dropped, and it gets zeros. Rows that the mask lets nobody see may hold anything. Neighbouring
    requests with the same pages are taken together: tokens of one prompt may come as requests of one token each.

    Args:
      rows_k: `[R, T, K, H]` in the dtype of the pools; `rows_v` is `[R, T, K, E]`.
      positions: Of the rows; a position is written once.
      pages: The pages of each request in order; entries past those it has may be any of the pool.
      pool_k: `[*L, P, Z, *row]`, K H numbers a row, float32, bfloat16, or int8 with scales; `pool_v` has K E. Donated,
        they are updated in place; another shape of the row might make XLA copy them.
      layers: Indices into the leading axes, i32 scalars.
      leaves: What mask and scores read, each with a leading axis of 1 or R.
      scales: Of int8 pools: rows `[R, T, K]`, pools `[*L, P, Z, *]` with K numbers a row.

    Returns: `out [R, T, N, E]` in the dtype of the queries, the pools of keys and values, and with scales their pools.

    Raises:
      NotImplementedError: `paged_attention_refusal` declines.
    """
    lead = pool_k.shape[: len(layers) + 2]
    as_heads = [
        jax.ShapeDtypeStruct((*lead, *rows.shape[2:]), pool.dtype)
        for rows, pool in ((rows_k, pool_k), (rows_v, pool_v))
    ]
    if reason := paged_attention_refusal(spec, query, *as_heads, num_keys=num_keys):
        raise NotImplementedError(f"the native CPU kernel declines: {reason}")
    if (scales is not None) != (pool_k.dtype == jnp.int8):
        raise ValueError(f"scales come with int8 pools and with no other, got {pool_k.dtype}")
    R, T, N, _ = query.shape
    told = _told(spec, leaves, sinks, _Sizes(R, T, N, rows_k.shape[2], num_keys))
    first = [query, rows_k, rows_v, positions, pages, pool_k, pool_v, *(scales or ())]
    results = [jax.ShapeDtypeStruct((R, T, N, rows_v.shape[-1]), query.dtype)]
    aliases = {}
    for pool in (5, 6) if scales is None else (5, 6, 9, 10):
        aliases[pool] = len(results)
        results.append(jax.ShapeDtypeStruct(first[pool].shape, first[pool].dtype))
    call = jax.ffi.ffi_call("fastgpt_paged_attention", results, input_output_aliases=aliases)
    numbers = {"num_keys": np.int64(num_keys), "num_layers": np.int64(len(layers))}
    indices = [jnp.asarray(layer, jnp.int32) for layer in layers]
    return tuple(call(*first, *indices, *told.operands, **numbers, **told.attributes))


# --------------------------------------------------------------------------------------- what the kernel is told
@dataclass(frozen=True)
class _Sizes:
    R: int
    T: int
    N: int
    K: int
    S: int

    def of(self, role: str) -> int:
        return {"n": self.N, "t": self.T, "s": self.S}[role]


@dataclass(frozen=True)
class _Told:
    operands: list[Array]
    attributes: dict[str, Any]


def _declined(
    spec: AttentionSpec, sizes: _Sizes, dtypes: Sequence[Any], widths: tuple[int, int], *, paged: bool = False
) -> str | None:
    query, key, value = (str(dtype) for dtype in dtypes)
    kept = ("float32", "bfloat16", "int8") if paged else ("float32", "bfloat16")
    if query not in kept[:2]:
        return f"queries must be float32 or bfloat16, got {query}"
    if key != value or key not in kept:
        return f"keys and values must both be {' or both '.join(kept)}, got {key} and {value}"
    if sizes.N // sizes.K > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads may read one KV head, got {sizes.N // sizes.K}"
    if max(widths) > MAX_HEAD:
        return f"heads are at most {MAX_HEAD} wide, got {max(widths)}"
    try:
        mask_program(spec.mask)
    except UnknownMask as reason:
        return str(reason)
    if isinstance(spec.score, Biased):
        roles = _roles(spec.score)
        num_bytes = 4 * sizes.R * math.prod(sizes.of(role) for role in roles)
        if num_bytes > MAX_BIAS_BYTES:
            return f"the bias takes up to {num_bytes} bytes, and at most {MAX_BIAS_BYTES} are made for the kernel"
    elif spec.score is not None and not isinstance(spec.score, Alibi):
        return f"of score functions it knows ALiBi and biases, got {type(spec.score).__name__}"
    return None


def _told(spec: AttentionSpec, leaves: Sequence[Any], sinks: Any, sizes: _Sizes) -> _Told:
    program, read = mask_program(spec.mask)
    operands = [jnp.asarray(leaves[leaf]).astype(jnp.int32) for leaf in read]
    score = spec.score
    if isinstance(score, Alibi):
        operands.append(jnp.asarray(leaves[score.leaf])[:, : sizes.N].astype(jnp.float32))
    if isinstance(score, Biased):
        operands.append(_bias(score, leaves, sizes))
    if sinks is not None:
        operands.append(sinks.astype(jnp.float32))
    attributes = {
        "program": np.asarray(program, np.int64),
        "scale": np.float32(spec.scale),
        "soft_cap": np.float32(spec.soft_cap or 0),
        "num_leaves": np.int64(len(read)),
        "has_slopes": isinstance(score, Alibi),
        "shift": np.int64(score.shift if isinstance(score, Alibi) else 0),
        "has_bias": isinstance(score, Biased),
        "has_sinks": sinks is not None,
    }
    return _Told(operands, attributes)


def _roles(score: Biased) -> set[str]:
    """Along which axes of the scores a bias differs, those of requests aside."""
    by_index = {node.role for node in walk(score.expression) if isinstance(node, Index)}
    return by_index.union(*(_ROLES[read.by] for read in score.reads))


def _bias(score: Biased, leaves: Sequence[Any], sizes: _Sizes) -> Array:
    """`[1 or R, 1 or T, 1 or N, 1 or S]`, float32."""
    roles = _roles(score)
    shape = [sizes.of(role) if role in roles else 1 for role in ("t", "n", "s")]
    q, head, k = (
        jnp.arange(size, dtype=jnp.int32).reshape([size if i == place else 1 for i in range(3)])
        for place, size in enumerate(shape)
    )

    def of_request(own: Sequence[Any]) -> Array:
        def look(read: Read) -> Any:
            return read.of(own[read.leaf], q, k, head)

        found = evaluate(score.expression, None, {"n": head, "t": q, "s": k}, [look(read) for read in score.held])
        return jnp.broadcast_to(found.astype(jnp.float32), shape)

    used = {read.leaf for read in score.reads}
    # A leaf that the bias does not read may have any shape: it is not mapped.
    kept = [leaf if i in used else jnp.zeros((1,), jnp.int32) for i, leaf in enumerate(leaves)]
    if all(leaf.shape[0] == 1 for leaf in kept):
        return of_request([leaf[0] for leaf in kept])[None]
    mapped, slim = over_requests(of_request, 0, kept)
    return mapped(slim)
