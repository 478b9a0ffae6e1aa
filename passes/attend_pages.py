"""Makes attention one operation with the writing and reading of cached rows, so that a kernel reads pages in place.

Matches: `attention` whose keys and values are what two `kv_update_read` of the same positions and pages read, behind
reshapes and the guard that reads rows nobody has written as row 0. Does not match: keys or values that are computed
from cached rows; rows of which heads are not the leading dimension; queries that are not the new rows. Must run after:
`attention`. Numerics: reassociates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from passes.attention.kernel_form import NoForm, kernel_form
from passes.attention.written_rows import sees_written_only
from passes.dce import dce
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.ops.paged_attention import Operands, paged_attention
from passes.patterns.driver import Editor, bodies_of, make_rewrite
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter

ATTEND_PAGES = "attend_pages"
_VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "copy", "copy_p"})
"""Operations that keep the order of numbers in memory."""


class _Miss(Exception):
    """Why an attention stays as it is."""


def attend_pages(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    counter = counter or RewriteCounter()
    rewrites, remarks = list[Rewrite](), list[Remark]()
    for body in bodies_of(graph):
        editor = Editor(body)
        for op in [op for op in body.ops if op.name == "attention"]:
            try:
                rewrites += _rewrite(editor, op, counter)
            except _Miss as miss:
                remarks.append(Remark.at(op, str(miss)))
        editor.finish()
    if rewrites:
        dce(graph)
    return PassResult(len(rewrites), tuple(remarks), tuple(rewrites))


@dataclass(frozen=True)
class _Cached:
    """Rows that an attention reads out of a cache, as numbers of `dtype`: rounded ones times what `scales` reads."""

    read: Op
    scales: Op | None
    dtype: Any
    lengths: Value

    @property
    def reads(self) -> list[Op]:
        return [self.read] if self.scales is None else [self.read, self.scales]


def _shared(read: Op) -> tuple[Any, ...]:
    return tuple(v if v.const is None else v.const.tobytes() for v in read.operands[2:])


def _rewrite(editor: Editor, op: Op, counter: RewriteCounter) -> list[Rewrite]:
    query, key, value, *rest = op.operands
    keys, values = _cached(key), _cached(value)
    is_alike = len({_shared(read) for read in (*keys.reads, *values.reads)}) == 1
    if not is_alike or keys.lengths is not values.lengths or len(keys.reads) != len(values.reads):
        raise _Miss("keys and values are rows of different positions, pages or layers")
    if keys.read is values.read:
        raise _Miss("keys and values are the same rows, and a kernel writes two pools")
    positions = keys.read.operands[2]
    num_new = positions.shape[1]
    if keys.dtype != values.dtype:
        raise _Miss(f"keys are {keys.dtype} and values {values.dtype}")
    if query.shape[1] != num_new:
        raise _Miss(f"it has {query.shape[1]} queries and {num_new} new rows a request")
    num_kv_heads, num_leaves = key.shape[2], op.params["num_leaves"]
    ways = {name: op.params[name] for name in ("score", "core_dtype", "weight_dtype", "out_dtype")}
    pools = [keys.read.operands[0], values.read.operands[0]]
    new = [keys.read.operands[1], values.read.operands[1]]
    flat = [query, pools[0], new[0], pools[1], new[1], *keys.read.operands[2:4], keys.lengths]
    flat += [*keys.read.operands[4:], *(v for read in (*keys.reads[1:], *values.reads[1:]) for v in read.operands[:2])]
    flat += rest
    roots = [op.result, *(read.results[1] for pair in zip(keys.reads, values.reads, strict=True) for read in pair)]
    operands = list(dict.fromkeys(v for v in flat if v.const is None))
    gone = editor.dying(roots, operands)
    if not {op, *keys.reads, *values.reads} <= gone:
        raise _Miss("the cached rows are read elsewhere too")

    is_behind = _sees_written_only(op, rest[:num_leaves], _start(positions, keys.lengths), num_new)

    def compute(*arrays: Any) -> list[Any]:
        by_value = dict(zip(operands, arrays, strict=True))
        taken = [by_value[v] if v.const is None else jnp.asarray(v.const) for v in flat]
        counts = {"num_layers": len(keys.read.operands) - 4, "num_leaves": num_leaves}
        given = Operands.of(taken, has_scales=keys.scales is not None, **counts)
        sizes = {"num_keys": key.shape[1], "num_kv_heads": num_kv_heads, "row_dtype": keys.dtype}
        return paged_attention(given, sees_written_only=is_behind, **sizes, **ways)

    rewrite = make_rewrite(ATTEND_PAGES, Numerics.REASSOCIATES, compute, operands, roots)
    if not counter.allows(ATTEND_PAGES, rewrite.source):
        return []
    editor.replace(rewrite, operands, roots)
    return [rewrite]


def _cached(value: Value) -> _Cached:
    """The rows that `[R, S, K, H]` are."""
    shape = value.shape
    guard = _behind_views(value)
    if guard is None or guard.name != "select_n" or len(guard.operands) != 3:
        raise _Miss("its keys or values are not rows of a cache as they are")
    condition, missing, view = guard.operands
    read, scales = _reads(view)
    row = [size for size in view.shape[2:] if size != 1]
    if view.shape[:2] != shape[:2] or row != [size for size in shape[2:] if size != 1]:
        raise _Miss(f"rows of {view.shape[2:]} are read as {shape[2:]}")
    if view is not _source(missing):
        raise _Miss("rows that nobody has written are not read as row 0")
    return _Cached(read, scales, view.dtype, _bound(condition, shape[0]))


def _reads(view: Value) -> tuple[Op, Op | None]:
    """What reads rows out of their pool, and their scales where `view` is the product of both."""
    whole = _read_of(view)
    if whole is not None:
        return whole, None
    made = _behind(view)[-1].op
    if made is not None and made.name == "mul":
        factors = [_behind(v)[-1] for v in made.operands]
        for rows, scales in (factors, factors[::-1]):
            of_rows, of_scales = _read_of(rows), _read_of(scales)
            if of_rows is not None and of_scales is not None and rows.shape[:-1] == scales.shape:
                return of_rows, of_scales
    raise _Miss("its keys or values are not rows of a cache as they are")


def _read_of(value: Value) -> Op | None:
    """The operation that reads these rows, from the first position on."""
    op = value.op
    if op is None or op.name != "kv_update_read" or value is not op.results[0] or op.params["length"] is None:
        return None
    return op


def _behind_views(value: Value) -> Op | None:
    while value.op is not None and value.op.name in _VIEWS:
        value = value.op.operands[0]
    return value.op


def _source(value: Value) -> Value:
    """The value behind slices and broadcasts."""
    while value.op is not None and value.op.name in ("broadcast_in_dim", "slice"):
        value = value.op.operands[0]
    return value


def _bound(condition: Value, num_requests: int) -> Value:
    """`lengths [R]` of `arange < lengths`."""
    compared = _behind(condition)[-1]
    if compared.op is None or compared.op.name != "lt":
        raise _Miss("which rows are there is not said by a length")
    bound = compared.op.operands[1]
    while bound.op is not None and bound.shape != (num_requests,) and bound.op.name in (*_VIEWS, "broadcast_in_dim"):
        bound = bound.op.operands[0]
    if bound.shape != (num_requests,) or bound.const is not None:
        raise _Miss("which rows are there is not said by a length of each request")
    return bound


def _start(positions: Value, lengths: Value) -> Value | None:
    """`start [R]` where positions are `start + arange` but for padding and lengths `start + count`; else None."""
    parts = [] if lengths.op is None or lengths.op.name != "add" else lengths.op.operands
    found = positions.op.operands[1:] if positions.op is not None and positions.op.name == "select_n" else []
    sums = [v.op.operands for v in found if v.op is not None and v.op.name == "add"]
    for operand in sums[0] if sums else []:
        for value in _behind(operand):
            if any(value is part for part in parts):
                return value
    return None


def _behind(value: Value) -> list[Value]:
    """A value and what it is a view or a broadcast of."""
    found = [value]
    while value.op is not None and value.op.name in (*_VIEWS, "broadcast_in_dim", "convert_element_type"):
        value = value.op.operands[0]
        found.append(value)
    return found


def _sees_written_only(op: Op, leaves: list[Value], start: Value | None, num_queries: int) -> bool:
    if start is None:
        return False
    starts = {i for i, leaf in enumerate(leaves) if any(value is start for value in _behind(leaf))}
    try:
        form = kernel_form(op.params["score"], num_queries, op.operands[1].shape[1])
    except NoForm:
        return False
    return sees_written_only(form, starts, num_queries)
