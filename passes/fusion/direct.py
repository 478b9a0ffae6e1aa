"""Rewrites at sites that a pass finds by itself, where one pattern rooted at one value would not do.

Knows no pass. The one idea: a site says which values are replaced, and by what function of which others; the rest is
the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from passes.dce import dce
from passes.graph import Graph, Value
from passes.numerics import Numerics
from passes.patterns.driver import Editor, bodies_of, make_rewrite
from passes.result import PassResult, Remark
from passes.rewrite import RewriteCounter


@dataclass(frozen=True)
class Site:
    """A rewrite that is wanted: `roots` as `build(*operands)`; no operand depends on a root."""

    operands: Sequence[Value]
    roots: Sequence[Value]
    build: Callable[..., Sequence[Any]]


def rewrite_sites(
    graph: Graph,
    rule: str,
    numerics: Numerics,
    find: Callable[[Graph], Sequence[Site | Remark]],
    counter: RewriteCounter | None,
) -> PassResult:
    """Rewrites in place what `find` finds in a graph and in its bodies; remarks that it gives are handed on."""
    counter = counter or RewriteCounter()
    result = PassResult()
    for body in bodies_of(graph):
        editor = Editor(body)
        for found in find(body):
            if isinstance(found, Remark):
                result += PassResult(remarks=(found,))
            elif counter.allows(rule, found.roots[0].source):
                result += _rewrite(editor, rule, numerics, found)
        editor.finish()
    if result.matched:
        dce(graph)
    return result


def _rewrite(editor: Editor, rule: str, numerics: Numerics, site: Site) -> PassResult:
    """One rewrite; operands that an earlier one replaced are what they became."""
    operands = list(dict.fromkeys(v for v in map(editor.now, site.operands) if v.const is None))
    everything = [editor.now(v) for v in site.operands]

    def compute(*arrays: Any) -> list[Any]:
        given = dict(zip(operands, arrays, strict=True))
        return list(site.build(*(given[v] if v.const is None else v.const for v in everything)))

    rewrite = make_rewrite(rule, numerics, compute, operands, site.roots)
    editor.replace(rewrite, operands, site.roots)
    return PassResult(matched=1, rewrites=(rewrite,))
