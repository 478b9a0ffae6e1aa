"""The pass `residual_norm`: a norm of a sum becomes one operation that gives the sum too.

Matches: the operations that `rms_norm` and `layer_norm` make, over a sum of two arrays of its shape and dtype.
Does not match: a sum with what is broadcast, such as a bias; a sum that is cast before the norm.
Must run after: `rms_norm` and `layer_norm`. Numerics: exact, operation by operation.
"""

from __future__ import annotations

from typing import Any

from passes.fusion.direct import Site, rewrite_sites
from passes.graph import Graph, Op
from passes.numerics import Numerics
from passes.ops.norms import layer_norm_p, rms_norm_p
from passes.ops.residual_norm import add_layer_norm_p, add_rms_norm_p
from passes.result import PassResult
from passes.rewrite import RewriteCounter

_JOINED = {rms_norm_p: add_rms_norm_p, layer_norm_p: add_layer_norm_p}


def residual_norm(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    return rewrite_sites(graph, "residual_norm", Numerics.EXACT, _sites, counter)


def _sites(graph: Graph) -> list[Site]:
    taken: set[Any] = set()
    sites = []
    for op in graph.ops:
        site = _site(op)
        if site is not None and site.roots[1] not in taken:
            taken.add(site.roots[1])
            sites.append(site)
    return sites


def _site(op: Op) -> Site | None:
    if op.primitive not in _JOINED:
        return None
    total, *extra = op.operands
    add = total.op
    if add is None or add.name != "add" or any(v.shape != total.shape or v.const is not None for v in add.operands):
        return None
    primitive, params = _JOINED[op.primitive], op.params

    def build(x: Any, y: Any, *rest: Any) -> list[Any]:
        return primitive.bind(x, y, *rest, **params)

    return Site([*add.operands, *extra], [op.result, total], build)
