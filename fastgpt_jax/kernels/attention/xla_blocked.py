"""Attention block by block in plain XLA, forward and backward: what runs where no kernel is selected.

Memory grows with T plus S: scores exist for one pair of blocks at a time. The one idea: a loop over the visited pairs
of a block list, whose trip count is known when it compiles, so that work left out is seen to be left out. Full blocks
and partial ones have a loop each; only the second evaluates the mask. Where numbers of a request say more (how many
keys there are, where its queries begin), the forward goes request by request and its loop ends where these say.
Arithmetic is float32.

The backward pass knows nothing of how the output was made: it makes weights again from `lse` (arXiv:2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastgpt_jax.kernels.attention.spec import (
    AttentionSpec,
    Keys,
    Queries,
    Result,
    Sinks,
    Values,
    check,
    over_requests,
    without_dead_keys,
)
from passes.block_lists import BlockList, block_list
from passes.masks import All, Mask, Read, key_rule

BLOCK_Q, BLOCK_K = 128, 128


class Gradients(NamedTuple):
    """Cotangents of what `attend` takes; None for leaves that are not floats, and for sinks that are not there."""

    query: Array
    key: Array
    value: Array
    leaves: list[Array | None]
    sinks: Array | None


def supports(spec: AttentionSpec, query: Any, key: Any, value: Any, leaves: Sequence[Any] = ()) -> str | None:
    """Why these arguments are declined; None where they are taken."""
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if not dtypes <= {"float32", "bfloat16", "float16"}:
        return f"it computes in float32, and the inputs are {', '.join(sorted(dtypes))}"
    return None


def attend(
    spec: AttentionSpec,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Result:
    """Attends; see `fastgpt_jax.kernels.attention.spec`."""
    check(spec, query, key, value, leaves, sinks)
    blocks = _blocks(spec, query.shape[1], key.shape[1], block_q, block_k)

    key, value = (jax.vmap(functools.partial(_rows, blocks=blocks))(x) for x in (key, value))
    if _is_bounded_at_run_time(blocks.rule):
        return _one_by_one(spec, blocks, query, key, value, leaves, sinks)

    def one(query: Array, key: Array, value: Array, leaves: Sequence[Any]) -> tuple[Array, Array]:
        return _attend_one(spec, blocks, query, lambda j: (_block(key, j), _block(value, j)), leaves, sinks)

    mapped, leaves = over_requests(one, 3, leaves)
    return mapped(query, key, value, leaves)


def _is_bounded_at_run_time(rule: Mask) -> bool:
    """Whether numbers of a request may empty whole blocks."""
    return any(read.by in ("request", "block") for read in rule.reads)


def _one_by_one(
    spec: AttentionSpec,
    blocks: BlockList,
    query: Array,
    key: Array,
    value: Array,
    leaves: Sequence[Any],
    sinks: Array | None,
) -> Result:
    """Maps over requests in turn: what each leaves out would be done for all of them if they went together."""
    B = query.shape[0]
    shared = [leaf.shape[0] == 1 for leaf in leaves]

    def at(i: Any) -> tuple[Array, Array]:
        def fetch(j: Any) -> tuple[Array, Array]:
            return _at(key, i, j), _at(value, i, j)

        own = [leaf[0] if is_shared else _block(leaf, i) for leaf, is_shared in zip(leaves, shared, strict=True)]
        return _attend_one(spec, blocks, _block(query, i), fetch, own, sinks)

    if B > 1:
        return lax.map(at, jnp.arange(B, dtype=jnp.int32))
    out, lse = at(0)
    return out[None], lse[None]


def _blocks(spec: AttentionSpec, T: int, S: int, block_q: int | None, block_k: int | None) -> BlockList:
    return block_list(spec.mask, T, S, min(block_q or BLOCK_Q, T), min(block_k or BLOCK_K, S))


# --------------------------------------------------------------------------------------- blocks of one request
def _query_blocks(x: Float[Array, "T N H"], blocks: BlockList, num_kv_heads: int) -> Array:
    """`[number of blocks, K, G, block_q, H]` in float32."""
    T, N, H = x.shape
    num = blocks.num_query_blocks
    x = jnp.pad(x, ((0, num * blocks.block_q - T), (0, 0), (0, 0))).astype(jnp.float32)
    return x.reshape(num, blocks.block_q, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _key_blocks(x: Float[Array, "S K H"], blocks: BlockList) -> Array:
    """`[number of blocks, K, block_k, H]`, in the dtype of the keys."""
    S, K, H = x.shape
    num = blocks.num_key_blocks
    x = jnp.pad(x, ((0, num * blocks.block_k - S), (0, 0), (0, 0)))
    return x.reshape(num, blocks.block_k, K, H).transpose(0, 2, 1, 3)


def _rows(x: Float[Array, "S K H"], blocks: BlockList) -> Array:
    """`[number of blocks, block_k, K, H]`: the same elements in the same order."""
    S, K, H = x.shape
    num = blocks.num_key_blocks
    return jnp.pad(x, ((0, num * blocks.block_k - S), (0, 0), (0, 0))).reshape(num, blocks.block_k, K, H)


def _live_rows(
    mask: Mask, blocks: BlockList, block: tuple[Array, Array], j: Array, leaves: Sequence[Any]
) -> tuple[Array, Array]:
    """One block of keys and values, rows that no query sees by the rule of keys made zero; see `without_dead_keys`."""
    rule, (key, value) = key_rule(mask), block
    if rule == All():
        return block
    k = j * blocks.block_k + jnp.arange(blocks.block_k, dtype=jnp.int32)
    live = rule.contains(jnp.zeros((), jnp.int32), k, leaves)[:, None, None]
    return jnp.where(live, key, jnp.zeros_like(key)), jnp.where(live, value, jnp.zeros_like(value))


def _row_blocks(x: Float[Array, "N T"], blocks: BlockList, num_kv_heads: int, fill: float) -> Array:
    """`[number of blocks, K, G, block_q]`, with a number for queries past the end."""
    N, T = x.shape
    num = blocks.num_query_blocks
    x = jnp.pad(x, ((0, 0), (0, num * blocks.block_q - T)), constant_values=fill)
    return x.reshape(num_kv_heads, N // num_kv_heads, num, blocks.block_q).transpose(2, 0, 1, 3)


def _from_query_blocks(x: Array, T: int) -> Array:
    """`[T, N, H]` of what `_query_blocks` makes."""
    num, K, G, block_q, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(num * block_q, K * G, H)[:T]


def _from_key_blocks(x: Array, S: int) -> Array:
    """`[S, K, H]` of what `_key_blocks` makes."""
    num, K, block_k, H = x.shape
    return x.transpose(0, 2, 1, 3).reshape(num * block_k, K, H)[:S]


def _block(x: Array, i: Any) -> Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _at(x: Array, i: Any, j: Any) -> Array:
    """`x[i, j]`, read where it lies."""
    start = (i, j, *[0] * (x.ndim - 2))
    return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:])).reshape(x.shape[2:])


def _update(x: Array, i: Array, block: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, block, i, 0)


def _dot(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y.astype(jnp.float32), precision="highest")


def _scores(
    spec: AttentionSpec, blocks: BlockList, q_block: Array, k_block: Array, leaves: Sequence[Any], at: Any, masked: bool
) -> Float[Array, "K G q s"]:
    """Scores of one pair of blocks, those at positions that the mask does not hold being -inf."""
    i, j = at
    K, G = q_block.shape[:2]
    q = (i * blocks.block_q + jnp.arange(blocks.block_q, dtype=jnp.int32))[:, None]
    k = (j * blocks.block_k + jnp.arange(blocks.block_k, dtype=jnp.int32))[None, :]
    head = jnp.arange(K * G, dtype=jnp.int32).reshape(K, G, 1, 1)
    scores = spec.scores(_dot("kgqh,ksh->kgqs", q_block, k_block), head, q, k, leaves)
    return jnp.where(blocks.rule.contains(q, k, leaves), scores, -jnp.inf) if masked else scores


def _over_pairs(
    blocks: BlockList,
    step: Callable[[Any, tuple[Array, Array], bool], Any],
    state: Any,
    leaves: Sequence[Any] | None = None,
) -> Any:
    """Runs `step(state, (query block, key block), masked)` over the full pairs, then over the partial ones.

    Args:
      leaves: Of one request, where they may leave out pairs.
    """
    for masked, chosen in ((False, blocks.is_full), (True, ~blocks.is_full)):
        if not chosen.any():
            continue
        q, k = jnp.asarray(blocks.query_blocks[chosen]), jnp.asarray(blocks.key_blocks[chosen])
        if masked and leaves is not None and _is_bounded_at_run_time(blocks.rule):
            state = _over_live_pairs(blocks, step, state, (q, k), leaves)
        else:
            state, _ = lax.scan(lambda state, at, masked=masked: (step(state, at, masked), None), state, (q, k))
    return state


def _over_live_pairs(
    blocks: BlockList, step: Callable[..., Any], state: Any, pairs: tuple[Array, Array], leaves: Sequence[Any]
) -> Any:
    """Runs `step` over the pairs that a request's numbers leave something visible in, in the same order."""
    q, k = pairs
    q0, k0 = q * blocks.block_q, k * blocks.block_k
    q1, k1 = jnp.minimum(q0 + blocks.block_q, blocks.num_q), jnp.minimum(k0 + blocks.block_k, blocks.num_k)

    def look(read: Read) -> Any:
        if read.by == "request":
            return read.of(leaves[read.leaf], None, None)
        if read.by == "block" and not (read.block[0] % blocks.block_q or read.block[1] % blocks.block_k):
            return read.of(leaves[read.leaf], q0, k0)
        return None

    possible = jnp.broadcast_to(blocks.rule.block(q0, q1, k0, k1, look)[0], q.shape)
    order = jnp.argsort(~possible, stable=True)
    q, k = q[order], k[order]
    return lax.fori_loop(0, possible.sum(), lambda p, state: step(state, (q[p], k[p]), True), state)


# --------------------------------------------------------------------------------------- forward
def _attend_one(
    spec: AttentionSpec,
    blocks: BlockList,
    query: Float[Array, "T N H"],
    fetch: Callable[[Any], tuple[Array, Array]],
    leaves: Sequence[Any],
    sinks: Array | None,
) -> tuple[Array, Array]:
    """One request, whose block j of keys and values `fetch(j)` gives, `[block_k, K, H]` and `[block_k, K, E]`."""
    T, N = query.shape[:2]
    K, E = (jax.eval_shape(fetch, 0)[i].shape[axis] for i, axis in ((0, 1), (1, 2)))
    queries = _query_blocks(query, blocks, K)

    def step(state: tuple[Array, Array, Array], at: tuple[Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        (i, j), (tops, totals, sums) = at, state
        # Rows are laid out by head here, so that those of blocks that are left out are never touched.
        k_block, v_block = (x.transpose(1, 0, 2) for x in _live_rows(spec.mask, blocks, fetch(j), j, leaves))
        scores = _scores(spec, blocks, _block(queries, i), k_block, leaves, at, masked)
        old = _block(tops, i)
        top = jnp.maximum(old, scores.max(axis=-1))
        finite = jnp.where(top == -jnp.inf, 0.0, top)  # where nothing is visible yet
        weights, shrink = jnp.exp(scores - finite[..., None]), jnp.exp(old - finite)
        total = _block(totals, i) * shrink + weights.sum(axis=-1)
        mixed = _block(sums, i) * shrink[..., None] + _dot("kgqs,kse->kgqe", weights, v_block)
        return _update(tops, i, top), _update(totals, i, total), _update(sums, i, mixed)

    # A sink is a key that is seen before all others and has no value.
    rows = queries.shape[:-1]
    tops = jnp.full(rows, -jnp.inf, jnp.float32)
    if sinks is not None:
        tops = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, N // K, 1), rows)
    totals = jnp.where(tops == -jnp.inf, 0.0, jnp.ones(rows, jnp.float32))
    sums = jnp.zeros((*rows, E), jnp.float32)
    tops, totals, sums = _over_pairs(blocks, step, (tops, totals, sums), leaves)
    divisor = jnp.where(totals == 0, 1.0, totals)
    lse = jnp.where(totals == 0, -jnp.inf, jnp.log(divisor) + tops)
    out = _from_query_blocks(sums / divisor[..., None], T).astype(query.dtype)
    return out, lse.transpose(1, 2, 0, 3).reshape(N, -1)[:, :T]


# --------------------------------------------------------------------------------------- backward
def gradients(
    spec: AttentionSpec,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any],
    sinks: Sinks | None,
    result: Result,
    cotangents: Result,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Gradients:
    """Cotangents of the inputs, from the result of any implementation and its cotangents."""
    blocks = _blocks(spec, query.shape[1], key.shape[1], block_q, block_k)
    (out, lse), (out_bar, lse_bar) = result, cotangents
    # d weight = weight * (d out . value - delta): what the softmax subtracts, less what asks for lse itself.
    out_bar = out_bar.astype(jnp.float32)
    delta = jnp.einsum("btne,btne->bnt", out.astype(jnp.float32), out_bar, precision="highest") - lse_bar
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # so that rows that see nothing have weights of 0

    mapped, slim = over_requests(functools.partial(_gradients_one, spec, blocks), 6, leaves)
    d_query, d_key, d_value, d_leaves = mapped(query, key, value, out_bar, lse, delta, slim)
    d_leaves = [
        None if d is None else (d if leaf.shape[0] == d.shape[0] else d.sum(axis=0, keepdims=True)).astype(leaf.dtype)
        for d, leaf in zip(d_leaves, leaves, strict=True)
    ]
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        d_sinks = -(weights * delta).sum(axis=(0, 2)).astype(sinks.dtype)
    return Gradients(d_query, d_key, d_value, d_leaves, d_sinks)


def _gradients_one(
    spec: AttentionSpec,
    blocks: BlockList,
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K E"],
    out_bar: Float[Array, "T N E"],
    lse: Float[Array, "N T"],
    delta: Float[Array, "N T"],
    leaves: Sequence[Any],
) -> tuple[Array, Array, Array, list[Array | None]]:
    T, S, K = query.shape[0], key.shape[0], key.shape[1]
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    live_key, live_value = without_dead_keys(spec.mask, key, value, leaves)
    queries, out_bars = (_query_blocks(x, blocks, K) for x in (query, out_bar))
    keys, values = (_key_blocks(x, blocks) for x in (live_key, live_value))
    lses, deltas = _row_blocks(lse, blocks, K, jnp.inf), _row_blocks(delta, blocks, K, 0.0)

    def step(state: Any, at: tuple[Array, Array], masked: bool) -> Any:
        (i, j), (d_queries, d_keys, d_values, d_floats) = at, state

        def scores_of(q_block: Array, k_block: Array, floats: list[Array]) -> Array:
            rest = iter(floats)
            mixed = [next(rest) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
            return _scores(spec, blocks, q_block, k_block, mixed, at, masked)

        floats = [leaf for f, leaf in zip(is_float, leaves, strict=True) if f]
        k_block = _block(keys, j).astype(jnp.float32)
        scores, pull = jax.vjp(scores_of, _block(queries, i), k_block, floats)
        weights = jnp.exp(scores - _block(lses, i)[..., None])
        out_block = _block(out_bars, i)
        d_weights = _dot("kgqe,kse->kgqs", out_block, _block(values, j))
        d_q, d_k, d_f = pull(weights * (d_weights - _block(deltas, i)[..., None]))
        d_v = _dot("kgqs,kgqe->kse", weights, out_block)
        return (
            _update(d_queries, i, _block(d_queries, i) + d_q),
            _update(d_keys, j, _block(d_keys, j) + d_k),
            _update(d_values, j, _block(d_values, j) + d_v),
            [total + d.astype(jnp.float32) for total, d in zip(d_floats, d_f, strict=True)],
        )

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values)]
    floats = [jnp.zeros(leaf.shape, jnp.float32) for f, leaf in zip(is_float, leaves, strict=True) if f]
    d_queries, d_keys, d_values, d_floats = _over_pairs(blocks, step, (*zeros, floats))
    rest = iter(d_floats)
    return (
        _from_query_blocks(d_queries, T).astype(query.dtype),
        _from_key_blocks(d_keys, S).astype(key.dtype),
        _from_key_blocks(d_values, S).astype(value.dtype),
        [next(rest) if f else None for f in is_float],
    )
