"""The passes that a textual pipeline may name, each with what it does to numbers.

Knows no compiler: the composition root hands the manager a larger table when it has more passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from passes.attention.rewrite import attention
from passes.canonicalize import canonicalize
from passes.cse import cse
from passes.dce import dce
from passes.fusion.gated_mlp import gated_mlp
from passes.fusion.layer_norm import layer_norm
from passes.fusion.merge_projections import merge_projections
from passes.fusion.residual_norm import residual_norm
from passes.fusion.rms_norm import rms_norm
from passes.fusion.rope import rope
from passes.numerics import Numerics as Numerics
from passes.result import PassResult
from passes.simplify import simplify
from passes.sparse_attention.narrow_reads import narrow_reads
from passes.sparse_attention.per_head import per_head


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
    [
        Pass("canonicalize", canonicalize, Numerics.EXACT),
        Pass("cse", cse, Numerics.EXACT),
        Pass("dce", dce, Numerics.EXACT),
        Pass("simplify", simplify, Numerics.EXACT),
        Pass("attention", attention, Numerics.REASSOCIATES, is_counted=True),
        Pass("per_head", per_head, Numerics.REASSOCIATES, is_counted=True),
        Pass("narrow_reads", narrow_reads, Numerics.REASSOCIATES, is_counted=True),
        Pass("layer_norm", layer_norm, Numerics.REASSOCIATES, is_counted=True),
        Pass("rms_norm", rms_norm, Numerics.REASSOCIATES, is_counted=True),
        Pass("rope", rope, Numerics.REASSOCIATES, is_counted=True),
        Pass("gated_mlp", gated_mlp, Numerics.REASSOCIATES, is_counted=True),
        Pass("residual_norm", residual_norm, Numerics.EXACT, is_counted=True),
        Pass("merge_projections", merge_projections, Numerics.REASSOCIATES, is_counted=True),
    ]
)

PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "fuse": (
            "simplify,attention,per_head,narrow_reads,layer_norm,rms_norm,rope,gated_mlp,residual_norm,"
            "merge_projections,simplify"
        ),
    }
)
"""Names that stand for several passes, in an order in which each finds what it looks for."""


def parse_pipeline(text: str, registry: Mapping[str, Pass] = PASSES) -> tuple[Pass, ...]:
    """Reads a pipeline such as `"canonicalize,cse,dce"` or `"fuse"`; the empty text is the empty pipeline.

    Raises:
      ValueError: a name is not in the registry.
    """
    given = [name.strip() for name in text.split(",")] if text.strip() else []
    names = [name for short in given for name in PIPELINES.get(short, short).split(",")]
    for name in names:
        if name not in registry:
            known = ", ".join([*registry, *PIPELINES])
            raise ValueError(f"a pipeline names passes separated by commas, got {name!r}; known: {known}")
    return tuple(registry[name] for name in names)
