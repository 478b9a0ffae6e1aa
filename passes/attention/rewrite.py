"""The pass `attention`: every softmax attention, however it is written, becomes one operation.

Matches: products of queries and keys in any layout, GQA and MQA by broadcast, repeat or grouped axes; scales on
queries, keys or scores; soft-caps, biases and masks by `where` or addition, in any order; softmax with or without its
maximum subtracted, in any float dtype, through `logsumexp`, divided before or after the values; sinks in the sum, or as
a column that is cut off behind the softmax.
Does not match: a sum or a contraction along other axes than the softmax's; weights that are also read elsewhere, since
they would have to be made anyway; shifts that vary along the keys.
Must run after: `simplify`. Numerics: reassociates.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from passes import compat
from passes.attention.expression import Expression
from passes.attention.layout import Layout, counts_requests, find_layout, is_at_one_position
from passes.attention.lift import Lifting
from passes.attention.recognize import Attention, NoMatch, find_products, recognize
from passes.attention.scores import find_core, masked_axes, score_expression
from passes.axes import View, look_through
from passes.dce import dce
from passes.graph import Graph, Op
from passes.layouts import lay_back, lay_out
from passes.numerics import Numerics
from passes.ops.attention import attention as attend
from passes.patterns.driver import Editor, bodies_of, make_rewrite
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter


def attention(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    counter = counter or RewriteCounter()
    rewrites: list[Rewrite] = []
    remarks: list[Remark] = []
    for body in bodies_of(graph):
        editor = Editor(body)
        for op in list(find_products(body)):
            if op in editor.dead or counter.is_exhausted:
                continue
            try:
                rewrites.append(_rewrite_at(editor, op, counter))
            except NoMatch as miss:
                if miss.near:
                    remarks.append(Remark.at(miss.op or op, miss.reason))
        editor.finish()
    if rewrites:
        dce(graph)
    return PassResult(len(rewrites), tuple(remarks), tuple(rewrites))


@dataclass(frozen=True)
class _Operand:
    """One operand of the operation: a value behind layout operations, the dtype it is read in, and its axes."""

    view: View
    dtype: Any

    def narrowed(self, x: Any) -> Any:
        """The array in the dtype it is read in, unless that is wider: products are exact in the narrower one."""
        is_narrower = np.dtype(self.dtype).itemsize < np.dtype(x.dtype).itemsize
        return x.astype(self.dtype) if is_narrower or not compat.is_inexact(x.dtype) else x


def _rewrite_at(editor: Editor, op: Op, counter: RewriteCounter) -> Rewrite:
    found = recognize(op, editor.users)
    core = find_core(found)
    queries = [_operand(found, product.first) for product in core.products]
    keys = [_operand(found, product.second) for product in core.products]
    values = _operand(found, found.values)
    sinks = [] if found.sinks is None else [_operand(found, found.sinks)]
    # By what lies behind repeats and broadcasts: heads that share keys are known by the axis that the keys lack.
    parts = zip(core.products, queries, keys, strict=True)
    products = [dataclasses.replace(p, first=query.view, second=key.view) for p, query, key in parts]
    masked = masked_axes(found, core)

    def lifted(**known: bool) -> tuple[Layout, Lifting, Expression]:
        layout = find_layout(found, products, values.view, masked, **known)
        lifting = Lifting(layout.roles())
        return layout, lifting, score_expression(found, core, lifting)

    layout, lifting, score = lifted()
    with contextlib.suppress(NoMatch):  # what the scores say of the axes may be no better
        if layout.batch and not layout.kv_heads:
            other = lifted(has_head_rule=True)
            if counts_requests(score) or len(other[1].leaves) < len(lifting.leaves):
                layout, lifting, score = other
        if layout.queries and is_at_one_position(score):
            layout, lifting, score = lifted(is_one_position=True, has_head_rule=bool(layout.kv_heads))
    leaves = [_Operand(view, view.value.dtype) for view in lifting.leaves]
    everything = [*queries, *keys, values, *leaves, *sinks]
    operands = list(dict.fromkeys(o.view.value for o in everything if o.view.value.const is None))
    if not found.inside <= editor.dying([found.root], operands):
        raise NoMatch("the weights or scores are read elsewhere too", found.root.op, near=True)

    def compute(*arrays: Any) -> list[Any]:
        by_value = dict(zip(operands, arrays, strict=True))

        def read(operand: _Operand) -> Any:
            value = operand.view.value
            return operand.narrowed(jnp.asarray(by_value[value] if value.const is None else value.const))

        return [_emit(found, layout, score, core, read, queries, keys, values, leaves, sinks)]

    rewrite = make_rewrite("attention", Numerics.REASSOCIATES, compute, operands, [found.root])
    counter.allows("attention", rewrite.source)
    editor.replace(rewrite, operands, [found.root])
    return rewrite


def _operand(found: Attention, view: View) -> _Operand:
    """An operand; what its layout says of axes is learned."""
    root, found.axes = look_through(view, found.axes)
    return _Operand(root, view.value.dtype)


def _emit(
    found: Attention,
    layout: Layout,
    score: Expression,
    core: Any,
    read: Any,
    queries: Sequence[_Operand],
    keys: Sequence[_Operand],
    values: _Operand,
    leaves: Sequence[_Operand],
    sinks: Sequence[_Operand],
) -> Any:
    """The operation over operands laid out as it takes them, and its result in the layout of what it replaces."""
    axes = layout.axes

    def place(operand: _Operand, *wanted: Any, is_full: bool = True) -> Any:
        return lay_out(read(operand), operand.view.dims, axes, wanted, is_full=is_full)

    query = [
        place(o, layout.batch, layout.queries, layout.heads, w) for o, w in zip(queries, layout.widths, strict=True)
    ]
    key = [place(o, layout.batch, layout.keys, layout.kv_heads, w) for o, w in zip(keys, layout.widths, strict=True)]
    value = place(values, layout.batch, layout.keys, layout.kv_heads, layout.value_width)
    lifted = [place(o, layout.batch, layout.queries, layout.heads, layout.keys, is_full=False) for o in leaves]
    sink = [place(o, layout.batch, layout.queries, layout.heads, is_full=False) for o in sinks]
    if found.base != 1.0:
        sink = [x.astype(jnp.float32) * found.base for x in sink]
    out = attend(
        _joined(query),
        _joined(key),
        value,
        lifted,
        sink[0] if sink else None,
        score=score,
        core_dtype=core.value.dtype,
        weight_dtype=found.weights.value.dtype,
        out_dtype=found.product.op.results[0].dtype,
    )
    held = (*layout.batch, *layout.queries, *layout.heads, *layout.value_width)
    out = lay_back(out, axes, held, found.dims, found.root.shape)
    return out.astype(found.root.dtype)


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
