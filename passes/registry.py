"""The passes that a textual pipeline may name, each with what it does to numbers.

Knows no compiler: the composition root hands the manager a larger table when it has more passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from passes.canonicalize import canonicalize
from passes.cse import cse
from passes.dce import dce
from passes.numerics import Numerics as Numerics
from passes.result import PassResult
from passes.simplify import simplify


@dataclass(frozen=True)
class Pass:
    """A named rewrite of a graph, in place.

    Attributes:
      function: Rewrites a graph; with `is_counted` also given the run's `RewriteCounter`, to ask before each rewrite.
      detail: Settings that decide what it does to numbers, such as a quantization scheme, for records.
    """

    name: str
    function: Callable[..., PassResult]
    numerics: Numerics
    is_counted: bool = False
    detail: str = ""


def make_registry(passes: Iterable[Pass]) -> Mapping[str, Pass]:
    """A frozen table name -> pass.

    Raises:
      ValueError: two passes have one name.
    """
    table: dict[str, Pass] = {}
    for entry in passes:
        if entry.name in table:
            raise ValueError(f"pass names must be unique, got {entry.name!r} twice")
        table[entry.name] = entry
    return MappingProxyType(table)


PASSES: Mapping[str, Pass] = make_registry(
    Pass(name, function, Numerics.EXACT)
    for name, function in [("canonicalize", canonicalize), ("cse", cse), ("dce", dce), ("simplify", simplify)]
)


def parse_pipeline(text: str, registry: Mapping[str, Pass] = PASSES) -> tuple[Pass, ...]:
    """Reads a pipeline such as `"canonicalize,cse,dce"`; the empty text is the empty pipeline.

    Raises:
      ValueError: a name is not in the registry.
    """
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    for name in names:
        if name not in registry:
            raise ValueError(f"a pipeline names passes separated by commas, got {name!r}; known: {', '.join(registry)}")
    return tuple(registry[name] for name in names)
