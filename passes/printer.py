"""Prints a graph as text, one operation a line with the user's source line. For people: nothing reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from passes.graph import Graph, Value

_LONG_PARAM = 60


def format_graph(graph: Graph, name: str = "graph") -> str:
    """The text of a graph, regions indented below the operation that owns them."""
    return "\n".join(_lines(graph, name, {}, ""))


def _lines(graph: Graph, name: str, names: dict[Value, str], indent: str) -> Iterator[str]:
    def define(value: Value) -> str:
        return f"{names.setdefault(value, f'%{len(names)}')}: {value!r}"

    yield f"{indent}{name}({', '.join(map(define, graph.inputs))}) {{"
    for op in graph.ops:
        results = ", ".join(map(define, op.results)) or "()"
        params = ", ".join(f"{key}={_param(value)}" for key, value in sorted(op.params.items()) if value is not None)
        operands = " ".join(_use(v, names) for v in op.operands)
        bracket = f"[{params}]" if params else ""
        yield f"{indent}  {results} = {op.name}{bracket} {operands}  # {op.source.short}"
        for i, region in enumerate(op.regions):
            yield from _lines(region, f"region {i}", names, indent + "    ")
    yield f"{indent}  return {', '.join(_use(v, names) for v in graph.outputs)}"
    yield f"{indent}}}"


def _use(value: Value, names: dict[Value, str]) -> str:
    if value.const is None:
        return names.get(value, "%undefined")
    if isinstance(value.const, np.ndarray) and value.const.ndim == 0:
        return f"{value.const}:{value.dtype}"
    return f"const:{value!r}"


def _param(param: Any) -> str:
    text = " ".join(str(param).split())
    return text if len(text) <= _LONG_PARAM else text[:_LONG_PARAM] + "..."
