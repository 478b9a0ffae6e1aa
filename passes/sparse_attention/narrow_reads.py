"""The pass `narrow_reads`: a step reads only those rows of its caches that its mask can hold.

Matches: the operation `attention` over keys and values that come row by row from caches (`kv_update_read`), where the
mask says that a query sees a band of keys around it and some first ones: windows and sinks, whether the model has them
or `sparse_attention` laid them over it. Keys and values become these rows, and scores are told their positions. Between
cache and attention rows may be cast, scaled, rotated, projected and laid out anew.
Does not match: masks that may hold all keys, keys that are joined with others along their axis, and what would read
more than `MAX_SHARE` of the rows.
Must run after: `attention` and `sparse_attention`. Numerics: reassociates; what is left out had weight 0.
That it had holds where requests can stand, so a rewrite is validated there (`narrow_instance.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes.attention.simplify_mask import Decomposed
from passes.dce import dce
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.ops.attention import attention as attend
from passes.ops.kv_update_read import kv_update_read, split_operands
from passes.reader import trace
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter
from passes.sparse_attention.layers import AttentionLayers, find_layers
from passes.sparse_attention.merge_reads import merge_reads
from passes.sparse_attention.narrow_instance import Standing, make_instance
from passes.sparse_attention.query_positions import decompose_at
from passes.sparse_attention.read_positions import ReadPositions, with_positions
from passes.sparse_attention.rows import Demand, NotByRows, RowProgram
from passes.sparse_attention.support import find_support

MAX_SHARE = 0.75
"""Rows read one by one cost more than pages read in a row: above this share of them nothing is gained."""


def narrow_reads(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    result, said = PassResult(), dict[str, list[AttentionLayers]]()
    touched: dict[int, Graph] = {}
    for item in find_layers(graph):
        found = _find(item)
        if isinstance(found, Remark):
            result += PassResult(remarks=(found,))
        if not isinstance(found, _Site):
            continue
        if counter is not None and not counter.allows("narrow_reads", item.op.source):
            break
        said.setdefault(found.describe(), []).append(item)
        rewrite = _rewrite(found)
        touched[id(item.graph)] = item.graph
        result += PassResult(1, rewrites=(rewrite,))
    if touched:
        dce(graph)
        for region in touched.values():
            merge_reads(region)
    notes = [Remark.at(items[0].op, f"{_times(items)}{line}") for line, items in said.items()]
    return result + PassResult(notes=tuple(notes))


def _times(items: Sequence[AttentionLayers]) -> str:
    """How often, where it is more than once; layers have no numbers any more where their heads were divided."""
    times = sum(len(item.layers) for item in items)
    return f"{times} times " if times > 1 else ""


@dataclass(frozen=True, eq=False)
class _Site:
    """An attention whose reads can be narrowed.

    Attributes:
      wanted: Rows of keys, of values, and of the leaves that run along the keys, by the place of the operand.
    """

    item: AttentionLayers
    form: Decomposed
    positions: ReadPositions
    program: RowProgram
    wanted: dict[int, Demand]

    @property
    def op(self) -> Op:
        return self.item.op

    def describe(self) -> str:
        B, T, N, H = self.op.operands[0].shape
        S, E = self.op.operands[1].shape[1], self.op.operands[2].shape[3]
        rows, flops = self.positions.num_rows, 2 * B * T * N * (H + E)
        return f"{rows} of {S} rows of keys and values are read; FLOPs {flops * S} -> {flops * rows}"


def _find(item: AttentionLayers) -> _Site | Remark | None:
    """The site; a remark where a narrow mask could not be made use of; None where there is nothing to do."""
    op = item.op
    T, S = op.operands[0].shape[1], op.operands[1].shape[1]
    form = decompose_at(op)
    support = None if form is None else find_support(form.mask)
    if form is None or support is None or not support.num_rows(T):
        return None
    positions = ReadPositions(support, T, S)
    num_leaves = op.params["num_leaves"]
    along_keys = [i for i, v in enumerate(op.operands[3 : 3 + num_leaves], start=3) if v.shape[3] > 1]
    program, wanted = RowProgram(), dict[int, Demand]()
    try:
        for place in (1, 2, *along_keys):
            value = op.operands[place]
            wanted[place] = Demand(value, 0 if place < 3 or value.shape[0] > 1 else None, 1 if place < 3 else 3)
            program.add(wanted[place])
    except NotByRows as miss:
        if miss.op is None:
            return None
        return Remark.at(miss.op, f"all rows of the cache are read though few are seen: {miss.reason}")
    if not program.reads or program.reads_all():
        return None
    if positions.num_rows > MAX_SHARE * S:
        reason = f"{positions.num_rows} of {S} rows are seen, too many to read them one by one"
        return Remark.at(op, reason)
    return _Site(item, form, positions, program, wanted)


# ------------------------------------------------------------------------------------------------- rewriting
def _rewrite(site: _Site) -> Rewrite:
    """Puts the narrow attention in the place of the one that there is."""
    op, graph, emitter = site.op, site.item.graph, _Emitter(site)
    standing = Standing(op, site.form, site.positions.support, emitter.operands)
    before, after = make_instance(standing, list(site.program.reads), emitter)
    body, _ = trace(emitter, *[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in emitter.operands])
    for _, made in body.walk():
        made.source = op.source
    body.replace(dict(zip(body.inputs, emitter.operands, strict=True)))
    at = graph.ops.index(op)
    graph.ops[at:at] = body.ops
    graph.replace({op.result: body.outputs[0]})
    return Rewrite("narrow_reads", Numerics.REASSOCIATES, before, after, op.source)


class _Emitter:
    """The narrow attention as a function of `operands`."""

    def __init__(self, site: _Site):
        self._site, op = site, site.op
        self._caches = list(site.program.reads)
        values = [op.operands[0], *op.operands[3:], *(demand.value for demand in site.program.whole)]
        for cache in self._caches:
            _, layers = split_operands(cache.operands, cache.params["length"])
            values += [cache.results[1], cache.operands[3], *layers]
        self.operands: list[Value] = list(dict.fromkeys(v for v in values if v.const is None))

    def __call__(self, *arrays: Any) -> Any:
        known = dict(zip(self.operands, arrays, strict=True))

        def get(value: Value) -> Any:
            return known[value] if value.const is None else jnp.asarray(value.const)

        site, op = self._site, self._site.op
        B, T, N, _ = op.operands[0].shape
        S, num_leaves = op.operands[1].shape[1], op.params["num_leaves"]
        leaves = [get(v) for v in op.operands[3 : 3 + num_leaves]]
        sinks = [get(v) for v in op.operands[3 + num_leaves :]]
        reads, shown = site.positions.make(site.form.starts((B, T, N, S), leaves))
        rows = self._rows(reads, get)
        for place, array in rows.items():
            if place >= 3:
                leaves[place - 3] = array
        moved = {place - 3 for place in rows if place >= 3}
        params = {name: x for name, x in op.params.items() if name not in ("score", "num_leaves")}
        return attend(
            get(op.operands[0]),
            rows[1],
            rows[2],
            [*leaves, shown[:, None, None, :]],
            sinks[0] if sinks else None,
            score=with_positions(op.params["score"], num_leaves, moved),
            **params,
        )

    def _rows(self, reads: Any, get: Any) -> dict[int, Any]:
        """The rows wanted, each `[B, ...]`."""
        program, wanted = self._site.program, self._site.wanted
        given: dict[Demand, tuple[Any, int | None]] = {}
        for demand in program.whole:
            given[demand] = get(demand.value), demand.batch
        for cache in self._caches:
            given |= self._read(cache, reads, get)
        demands, places = list(given), list(wanted)
        arrays, dims = zip(*given.values(), strict=True)

        def one(positions: Any, *arrays: Any) -> list[Any]:
            single = [x if dim is None else jnp.expand_dims(x, dim) for dim, x in zip(dims, arrays, strict=True)]
            made = program.run([wanted[p] for p in places], dict(zip(demands, single, strict=True)), positions)
            return [x[0] for x in made]

        made = jax.vmap(one, (0, *dims))(reads, *arrays)
        return dict(zip(places, made, strict=True))

    def _read(self, cache: Op, reads: Any, get: Any) -> dict[Demand, tuple[Any, int | None]]:
        """Rows of a cache: those at `reads`, and fixed ones, which are among them or read before them."""
        _, layers = split_operands(cache.operands, cache.params["length"])
        demands, positions = self._site.program.reads[cache], self._site.positions
        more = {d.fixed for d in demands if d.fixed is not None and positions.place_of(*d.fixed) is None}
        fixed = sorted(more)
        extra = np.concatenate([np.arange(*f) for f in fixed] or [np.zeros(0)]).astype(np.int32)
        extra = jnp.broadcast_to(jnp.asarray(extra), (reads.shape[0], len(extra)))
        old_rows, old_positions = cache.operands[1], cache.operands[2]
        view, _ = kv_update_read(
            get(cache.results[1]),
            [get(layer) for layer in layers],
            jnp.zeros((old_rows.shape[0], 0, *old_rows.shape[2:]), old_rows.dtype),
            jnp.zeros((old_positions.shape[0], 0), old_positions.dtype),
            get(cache.operands[3]),
            reads=jnp.concatenate([extra, reads], axis=1) if fixed else reads,
        )
        given: dict[Demand, tuple[Any, int | None]] = {}
        for demand in demands:
            first, end = extra.shape[1], view.shape[1]
            if demand.fixed is not None:
                place = positions.place_of(*demand.fixed)
                sizes = [b - a for a, b in fixed[: fixed.index(demand.fixed)]] if place is None else []
                first = sum(sizes) if place is None else extra.shape[1] + place
                end = first + demand.fixed[1] - demand.fixed[0]
            given[demand] = view[:, first:end], 0
        return given
