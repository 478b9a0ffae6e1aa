"""Flash attention forward in Pallas' TPU dialect, over block lists (arXiv:2307.08691).

The grid's last axis walks the visited pairs of blocks, which scalar prefetch hands to the index maps: an empty block is
never fetched. Full blocks run unmasked; partial ones evaluate the mask on positions in registers, and where a run-time
leaf says that a block holds nothing (past the length, not in the table), it is passed over.

The one idea: all query heads of a KV head are rows of one tile, so that keys are read once a KV head. Scratch depends
on block sizes alone. Products of bfloat16 run as such, with float32 sums; weights meet values in the dtype of the
values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

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
from passes.masks import Mask, Read
from passes.scores import Alibi

LANES = 128
MAX_ROWS = 2048
MAX_PREFETCH_BYTES = 512 * 1024  # of the smallest scalar memory, 1 MiB

# What a step of the grid does, as bits.
_FIRST, _LAST, _FULL, _PARTIAL = 1, 2, 4, 8


def supports(
    spec: AttentionSpec,
    query: Any,
    key: Any,
    value: Any,
    leaves: Sequence[Any] = (),
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> str | None:
    """Why these arguments are declined; None where they are taken."""
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        return f"queries, keys and values must all be float32 or all bfloat16, got {', '.join(sorted(dtypes))}"
    if spec.score is not None and not isinstance(spec.score, Alibi):
        return f"of score functions it knows ALiBi only, got {type(spec.score).__name__}"
    return _block_sizes_declined(spec, query, key, block_q, block_k)


def _block_sizes_declined(spec: AttentionSpec, query: Any, key: Any, block_q: int | None, block_k: int | None):
    block_q, block_k = block_sizes(spec, query, key, block_q, block_k)
    sublanes = _sublanes(query.dtype)
    if block_q % sublanes or block_k % LANES:
        return (
            f"block_q must be a multiple of {sublanes} and block_k one of {LANES} for {query.dtype}, "
            f"got {block_q} and {block_k}"
        )
    if (rows := block_q * query.shape[2] // key.shape[2]) > MAX_ROWS:
        return f"a tile holds at most {MAX_ROWS} rows, and block_q times query heads a KV head is {rows}"
    for read in spec.mask.reads:
        if read.by == "block" and (read.block[0] % block_q or read.block[1] % block_k):
            return f"blocks of a run-time table must be multiples of {block_q} by {block_k}, got {read.block}"
    blocks = block_list(spec.mask, query.shape[1], key.shape[1], block_q, block_k)
    num_bytes = 3 * 4 * (blocks.num_visited + blocks.num_query_blocks)
    if num_bytes > MAX_PREFETCH_BYTES:
        return f"the block list takes {num_bytes} bytes of scalar memory, at most {MAX_PREFETCH_BYTES}: larger blocks"
    return None


def block_sizes(
    spec: AttentionSpec, query: Any, key: Any, block_q: int | None = None, block_k: int | None = None
) -> tuple[int, int]:
    """Block sizes for arguments that do not say theirs: 1024 rows by 512 keys, less where a table asks for less."""
    group, sublanes = query.shape[2] // key.shape[2], _sublanes(query.dtype)
    tables = [read.block for read in spec.mask.reads if read.by == "block"]
    if block_q is None:
        most = min([512, *(q for q, _ in tables)])
        block_q = max(sublanes, min(_power_of_2(1024 // group), most, _round_up(query.shape[1], sublanes)))
    if block_k is None:
        block_k = min([512, *(k for _, k in tables), _round_up(key.shape[1], LANES)])
    return block_q, block_k


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
    interpret: bool = False,
) -> Result:
    """Attends; see `fastgpt_jax.kernels.attention.spec`.

    Args:
      block_q: Queries a tile, of each head.
      block_k: Keys a tile.
      interpret: Whether the kernel is run by the interpreter, on any device.

    Raises:
      NotImplementedError: `supports` declines.
    """
    check(spec, query, key, value, leaves, sinks)
    if reason := supports(spec, query, key, value, leaves, block_q=block_q, block_k=block_k):
        raise NotImplementedError(f"the Pallas TPU kernel declines: {reason}")
    block_q, block_k = block_sizes(spec, query, key, block_q, block_k)
    blocks = block_list(spec.mask, query.shape[1], key.shape[1], block_q, block_k)
    mapped, slim = over_requests(functools.partial(_live, spec.mask), 2, leaves)
    key, value = mapped(key, value, slim)
    return _call(_Tile.of(spec, blocks, query, key, value), query, key, value, leaves, sinks, interpret)


def _live(mask: Mask, key: Array, value: Array, leaves: Sequence[Any]) -> tuple[Array, Array]:
    return without_dead_keys(mask, key, value, leaves)


def _sublanes(dtype: Any) -> int:
    """Rows of the smallest tile of a dtype."""
    return 32 // np.dtype(dtype).itemsize


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power_of_2(number: int) -> int:
    """The largest power of 2 that is no larger; at least 1."""
    return 1 << max(0, number.bit_length() - 1)


# --------------------------------------------------------------------------------------- the call
@dataclass(frozen=True)
class _Tile:
    """What is static about a call."""

    spec: AttentionSpec
    blocks: BlockList
    num_kv_heads: int
    group: int
    value_width: int

    @classmethod
    def of(cls, spec: AttentionSpec, blocks: BlockList, query: Array, key: Array, value: Array) -> _Tile:
        return cls(spec, blocks, key.shape[2], query.shape[2] // key.shape[2], _round_up(value.shape[3], LANES))

    @property
    def block_q(self) -> int:
        return self.blocks.block_q

    @property
    def block_k(self) -> int:
        return self.blocks.block_k

    @property
    def rows(self) -> int:
        return self.group * self.block_q

    @property
    def scratch(self) -> list[Any]:
        """The largest score so far and the sum of weights, the same in all lanes, and the sum of weighted values."""
        lanes = pltpu.VMEM((self.rows, LANES), jnp.float32)
        return [lanes, lanes, pltpu.VMEM((self.rows, self.value_width), jnp.float32)]


def _steps(blocks: BlockList) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query block, key block and kind of each step; a query block without keys has one step, which writes zeros."""
    q, k, kind = [], [], []
    for i in range(blocks.num_query_blocks):
        row = slice(blocks.row_starts[i], blocks.row_starts[i + 1])
        keys = blocks.key_blocks[row]
        kinds = np.where(blocks.is_full[row], _FULL, _PARTIAL)
        if len(keys) == 0:
            keys, kinds = np.zeros(1, np.int32), np.zeros(1, np.int64)
        kinds[0] |= _FIRST
        kinds[-1] |= _LAST
        q.append(np.full(len(keys), i))
        k.append(keys)
        kind.append(kinds)
    arrays = (np.concatenate(x).astype(np.int32) for x in (q, k, kind))
    return next(arrays), next(arrays), next(arrays)


def _call(
    tile: _Tile, query: Array, key: Array, value: Array, leaves: Sequence[Array], sinks: Array | None, interpret: bool
) -> tuple[Array, Array]:
    blocks, K, G = tile.blocks, tile.num_kv_heads, tile.group
    B, T, N, H = query.shape
    E = value.shape[3]
    padded_T = blocks.num_query_blocks * tile.block_q
    padded_S = blocks.num_key_blocks * tile.block_k
    width = _round_up(H, LANES)
    queries = _padded(query, padded_T, width).reshape(B, padded_T, K, G, width).transpose(0, 2, 3, 1, 4)
    keys = _padded(key, padded_S, width).transpose(0, 2, 1, 3)
    values = _padded(value, padded_S, tile.value_width).transpose(0, 2, 1, 3)
    operands = [_operand(read, tile, leaves) for read in tile.spec.reads]
    if sinks is None:
        sinks = jnp.full((N,), -jnp.inf, jnp.float32)
    q_spec = pl.BlockSpec((None, None, G, tile.block_q, width), lambda b, h, p, q, k, kind: (b, h, 0, q[p], 0))
    k_spec = pl.BlockSpec((None, None, tile.block_k, width), lambda b, h, p, q, k, kind: (b, h, k[p], 0))
    v_spec = pl.BlockSpec((None, None, tile.block_k, tile.value_width), lambda b, h, p, q, k, kind: (b, h, k[p], 0))
    out_spec = pl.BlockSpec(
        (None, None, G, tile.block_q, tile.value_width), lambda b, h, p, q, k, kind: (b, h, 0, q[p], 0)
    )
    lse_spec = pl.BlockSpec((None, None, G, tile.block_q, 1), lambda b, h, p, q, k, kind: (b, h, 0, q[p], 0))
    steps = _steps(blocks)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, tile, [place for place, _, _ in operands]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(B, K, len(steps[0])),
            in_specs=[q_spec, k_spec, v_spec, pl.BlockSpec(memory_space=pltpu.SMEM), *(x for _, _, x in operands)],
            out_specs=[out_spec, lse_spec],
            scratch_shapes=tile.scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, G, padded_T, tile.value_width), query.dtype),
            jax.ShapeDtypeStruct((B, K, G, padded_T, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flash_attention",
    )(*map(jnp.asarray, steps), queries, keys, values, sinks.astype(jnp.float32), *(x for _, x, _ in operands))
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, padded_T, N, tile.value_width)
    return out[:, :T, :, :E], lse.reshape(B, N, padded_T)[:, :, :T]


def _padded(x: Array, length: int, width: int) -> Array:
    """`[B, length, heads, width]`, with zeros at both ends."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))


@dataclass(frozen=True)
class _Place:
    """Where a kernel finds what one read asks for.

    Attributes:
      per_request: How many numbers of each request lie in scalar memory; 0 where all requests share them.
      columns: How many of them make up a row of a table.
    """

    read: Read
    per_request: int = 0
    columns: int = 1


def _operand(read: Read, tile: _Tile, leaves: Sequence[Array]) -> tuple[_Place, Array, pl.BlockSpec]:
    """A leaf laid out for one read: a column of queries, a row of keys, or numbers in scalar memory."""
    leaf = leaves[read.leaf]
    if read.word is not None:
        leaf = leaf[..., read.word]
    shared = leaf.shape[0] == 1
    blocks = tile.blocks
    if read.by == "query":
        leaf = _fitted(leaf, blocks.num_query_blocks * tile.block_q)[:, :, None]
        column = (None, tile.block_q, 1)
        return _Place(read), leaf, pl.BlockSpec(column, lambda b, h, p, q, k, kind: (0 if shared else b, q[p], 0))
    if read.by == "key":
        leaf = _fitted(leaf, blocks.num_key_blocks * tile.block_k)[:, None, :]
        row = (None, 1, tile.block_k)
        return _Place(read), leaf, pl.BlockSpec(row, lambda b, h, p, q, k, kind: (0 if shared else b, 0, k[p]))
    flat = leaf.reshape(-1).astype(jnp.float32 if read.by == "head" else jnp.int32)
    place = _Place(read, 0 if shared else flat.size // leaf.shape[0], leaf.shape[-1])
    return place, flat, pl.BlockSpec(memory_space=pltpu.SMEM)


def _fitted(leaf: Array, size: int) -> Array:
    """`[B, size]` numbers, cut or filled with zeros."""
    leaf = leaf[:, :size].astype(jnp.int32)
    return jnp.pad(leaf, ((0, 0), (0, size - leaf.shape[1])))


# --------------------------------------------------------------------------------------- the kernel
def _kernel(tile: _Tile, places: Sequence[_Place], q_steps_ref, k_steps_ref, kinds_ref, *refs: Any) -> None:
    queries_ref, keys_ref, values_ref, sinks_ref = refs[:4]
    leaf_refs = refs[4 : 4 + len(places)]
    out_ref, lse_ref, tops_scratch, totals_scratch, sums_scratch = refs[4 + len(places) :]
    kv_head, p = pl.program_id(1), pl.program_id(2)
    q0, k0, kind = q_steps_ref[p] * tile.block_q, k_steps_ref[p] * tile.block_k, kinds_ref[p]
    registers = _Registers(tile, dict(zip(places, leaf_refs, strict=True)), pl.program_id(0), kv_head, q0, k0)

    def step(masked: bool) -> None:
        keys = keys_ref[...]
        queries = queries_ref[...].reshape(tile.rows, keys.shape[1])
        products = _dot(queries, keys, ((1,), (1,)))
        scores = _scores(tile, products, registers, masked)
        old = tops_scratch[:, :1]
        top = jnp.maximum(old, scores.max(axis=1, keepdims=True))
        finite = jnp.where(top == -jnp.inf, 0.0, top)  # where nothing is visible yet
        weights, shrink = jnp.exp(scores - finite), jnp.exp(old - finite)
        total = totals_scratch[:, :1] * shrink + weights.sum(axis=1, keepdims=True)
        values = values_ref[...]
        mixed = _dot(weights.astype(values.dtype), values, ((1,), (0,)))
        sums_scratch[...] = sums_scratch[...] * shrink + mixed
        tops_scratch[...] = jnp.broadcast_to(top, tops_scratch.shape)
        totals_scratch[...] = jnp.broadcast_to(total, totals_scratch.shape)

    @pl.when(kind & _FIRST != 0)
    def _start() -> None:
        # A sink is a key that is seen before all others and has no value.
        for g in range(tile.group):
            sink = sinks_ref[kv_head * tile.group + g]
            rows = slice(g * tile.block_q, (g + 1) * tile.block_q)
            tops_scratch[rows, :] = jnp.full((tile.block_q, LANES), sink, jnp.float32)
            totals_scratch[rows, :] = jnp.full((tile.block_q, LANES), jnp.where(sink == -jnp.inf, 0.0, 1.0))
        sums_scratch[...] = jnp.zeros(sums_scratch.shape, jnp.float32)

    if tile.blocks.num_full:

        @pl.when(kind & _FULL != 0)
        def _full() -> None:
            step(masked=False)

    if tile.blocks.num_partial:

        @pl.when((kind & _PARTIAL != 0) & registers.is_possible())
        def _partial() -> None:
            step(masked=True)

    @pl.when(kind & _LAST != 0)
    def _finish() -> None:
        total, top = totals_scratch[:, :1], tops_scratch[:, :1]
        divisor = jnp.where(total == 0, 1.0, total)
        out_ref[...] = (sums_scratch[...] / divisor).astype(out_ref.dtype).reshape(out_ref.shape)
        lse = jnp.where(total == 0, -jnp.inf, jnp.log(divisor) + top)
        lse_ref[...] = lse.reshape(lse_ref.shape)


def _dot(x: Array, y: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    # Products of float32 at the default precision of the matrix unit would be those of bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


@dataclass(frozen=True, eq=False)
class _Registers:
    """What one step of the grid knows of positions and leaves."""

    tile: _Tile
    refs: dict[_Place, Any]
    request: Any
    kv_head: Any
    q0: Any
    k0: Any

    def whole(self, read: Read) -> Any:
        """Answers reads that have one value in the whole tile, and None to others."""
        place, ref = self._find(read)
        start = self.request * place.per_request
        if read.by == "block":
            row, column = lax.div(self.q0, read.block[0]), lax.div(self.k0, read.block[1])
            return ref[start + row * place.columns + column]
        return ref[start] if read.by == "request" else None

    def look(self, read: Read) -> Any:
        """Answers reads for the positions of the tile; by head, for the heads of the group `[G, 1, 1]`."""
        place, ref = self._find(read)
        if read.by == "head":
            start = self.request * place.per_request + self.kv_head * self.tile.group
            shape = (self.tile.group, 1, 1)
            number = lax.broadcasted_iota(jnp.int32, shape, 0)
            return sum(jnp.where(number == g, ref[start + g], 0.0) for g in range(self.tile.group))
        if read.by in ("query", "key"):
            return jnp.broadcast_to(ref[...], (self.tile.block_q, self.tile.block_k))
        return self.whole(read)

    def is_possible(self) -> Any:
        """Whether run-time numbers leave anything visible in the tile."""
        if not any(place.read.by in ("request", "block") for place in self.refs):
            return True
        q1, k1 = self.q0 + self.tile.block_q, self.k0 + self.tile.block_k
        return self.tile.blocks.rule.block(self.q0, q1, self.k0, k1, self.whole)[0]

    def _find(self, read: Read) -> tuple[_Place, Any]:
        return next((place, ref) for place, ref in self.refs.items() if place.read == read)


def _scores(tile: _Tile, products: Array, registers: _Registers, masked: bool) -> Array:
    """Scores `[rows, block_k]`; head g of the group has rows `g * block_q` and on."""
    spec, block = tile.spec, (tile.block_q, tile.block_k)
    q = registers.q0 + lax.broadcasted_iota(jnp.int32, block, 0)
    k = registers.k0 + lax.broadcasted_iota(jnp.int32, block, 1)
    scores = spec.capped(products).reshape(tile.group, *block)
    if spec.score is not None:
        scores = spec.score.evaluate(scores, None, q[None], k[None], registers.look)
    if masked:
        seen = tile.blocks.rule.evaluate(q, k, registers.look)
        scores = jnp.where(jnp.broadcast_to(seen[None], scores.shape), scores, -jnp.inf)
    return scores.reshape(tile.rows, tile.block_k)
