"""The pass `per_head`: heads that a program gives masks of their own become operations of their own.

Matches: the operation `attention` whose mask is a rule of heads (`where(head < 2, window, causal)`, windows as a
constant array along the heads), in the program and in the bodies of loops. Does not match: rules that are known only
when the program runs, and rules that change back and forth more than `MAX_PIECES` times along the heads: both run
whole, with a remark. Must run after: `attention` and `sparse_attention`, whose layers it would divide. Numerics:
reassociates.

Each piece has a mask of positions alone, which `narrow_reads` and kernels that walk blocks of a mask can use.
"""

from __future__ import annotations

from passes.attention.head_rules import has_head_rules
from passes.dce import dce
from passes.graph import Graph
from passes.masks import All
from passes.result import PassResult, Remark
from passes.rewrite import RewriteCounter
from passes.sparse_attention.layers import find_layers
from passes.sparse_attention.pieces import Site, divide

MAX_PIECES = 8
"""Operations that one attention may become: more read keys and values more often than the masks save."""


def per_head(graph: Graph, counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place, loop bodies too."""
    result, counter = PassResult(), counter or RewriteCounter()
    for item in find_layers(graph):
        if not has_head_rules(item.op):
            continue
        site = Site.of(item, [All()] * item.num_heads)
        if isinstance(site, Site) and len(site.pieces) > MAX_PIECES:
            site = f"its heads would be {len(site.pieces)} operations, and at most {MAX_PIECES} are made"
        if isinstance(site, str):
            result += PassResult(remarks=(Remark.at(item.op, f"{item.layer_text}: all heads stay together: {site}"),))
            continue
        if not counter.allows("per_head", item.op.source):
            break
        result += PassResult(1, rewrites=(divide("per_head", site),))
    if result.matched:
        dce(graph)
    return result
