"""Lays weights of products out in rows `[..., O, K]`, one an output channel: the products become `weight_dot`.

A kernel then reads a weight in one stream, whatever layout the model keeps it in; the layout is made once, with what
else parameters alone determine. Matches: `dot_general` in any layout with one operand that parameters alone determine
(`passes/quantization/sites.py` finds them), where the target has a kernel that takes them. Does not match: weights of
loop bodies; a weight that would have to be kept twice, since something else reads it as it lies. Must run after:
`simplify`, whatever merges weights, and `quantize_weights`. Numerics: reassociates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from passes.dce import dce
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.ops.stored import stored
from passes.ops.weight_dot import weight_dot
from passes.patterns.driver import Editor, make_rewrite
from passes.quantization.instances import make_instance
from passes.quantization.replacements import product_in_rows
from passes.quantization.sites import Site, find_sites
from passes.quantization.views import Canonical
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter

WEIGHT_ROWS = "weight_rows"
Refusal = Callable[[Any, Any], str | None]
"""Why a target has no kernel for activations and rows of these shapes and dtypes; None where it has one."""


def weight_rows(graph: Graph, counter: RewriteCounter | None = None, *, refusal: Refusal) -> PassResult:
    """Rewrites in place, outside of loops.

    Args:
      refusal: Asked for each weight; it must not look at the number of rows of activations, since all steps share the
        weights.
    """
    counter = counter or RewriteCounter()
    sites = [s for s in find_sites(graph) if s.kind == "dot" and s.obstacle is None and s.scope.parent is None]
    planned = {(id(site.op), site.operand) for site in sites}
    editor, rewrites, remarks = Editor(graph), list[Rewrite](), list[Remark]()
    static = set(sites[0].scope.static) if sites else set[Value]()
    for site in sites:
        canonical = site.canonical()
        x, weight = site.op.operands[1 - site.operand], site.weight
        reason = refusal(x.aval, jax.ShapeDtypeStruct(canonical.shape, weight.dtype))
        if reason is None and not _is_in_rows(site, canonical):
            reader = next(_other_readers(editor, site.view.root, static, planned), None)
            reason = None if reader is None else f"`{reader.name}` at {reader.source.short} reads it as it lies"
        if reason is not None:
            remarks.append(Remark.at(site.op, f"{', '.join(site.paths)} stays as it lies: {reason}"))
        elif counter.allows(WEIGHT_ROWS, site.op.source):
            rewrites.append(_rewrite(editor, site, canonical))
    editor.finish()
    if rewrites:
        dce(graph)
    return PassResult(len(rewrites), tuple(remarks), tuple(rewrites))


def _is_in_rows(site: Site, canonical: Canonical) -> bool:
    """Whether the weight lies in rows already, so that nothing new is kept."""
    root = site.view.root
    return (
        root.shape == canonical.shape
        and root.dtype == site.weight.dtype
        and list(canonical.order) == sorted(canonical.order)
    )


def _other_readers(editor: Editor, value: Value, static: set[Value], planned: set[tuple[int, int]]) -> Iterator[Op]:
    """Operations of a step that read a weight, or what is made of all of it, and are no product to be rewritten."""
    for op in editor.users.get(value, ()):
        if all(v in static or v.const is not None for v in op.operands):
            for result in op.results:
                if result.size >= value.size:
                    yield from _other_readers(editor, result, static, planned)
        elif any((id(op), i) not in planned for i, v in enumerate(op.operands) if v is value):
            yield op


def _rewrite(editor: Editor, site: Site, canonical: Canonical) -> Rewrite:
    """Rewrites one product; what is validated is the product by itself, with two rows of activations."""
    before, after = make_instance(site.op, site.operand, _rewrite_alone)
    _lay_out(editor, site, canonical)
    return Rewrite(WEIGHT_ROWS, Numerics.REASSOCIATES, before, after, site.op.source)


def _rewrite_alone(graph: Graph) -> None:
    editor = Editor(graph)
    for site in find_sites(graph):
        _lay_out(editor, site, site.canonical())
    editor.finish()


def _lay_out(editor: Editor, site: Site, canonical: Canonical) -> None:
    fn, x = product_in_rows(site, weight_dot)
    root, dtype, lies_in_rows = site.view.root, site.weight.dtype, _is_in_rows(site, canonical)

    def compute(x: Any, root: Any) -> list[Any]:
        return [fn(x, root if lies_in_rows else stored(canonical(root).astype(dtype)))]

    rewrite = make_rewrite(WEIGHT_ROWS, Numerics.REASSOCIATES, compute, [x, root], [site.op.result])
    editor.replace(rewrite, [x, root], [site.op.result])
