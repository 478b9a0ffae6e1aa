"""Which implementations there are of each operation of ours: the table of `select`, and the passes that prepare for it.

Knows what is compiled for, and no graph.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from types import MappingProxyType
from typing import Any

from fastgpt_jax.compiler import attention_kernels, cpu_attention, cpu_kernels
from passes.attend_pages import ATTEND_PAGES, attend_pages
from passes.fusion.merge_projections import CutOf, merge_projections
from passes.graph import Graph
from passes.numerics import Numerics
from passes.registry import PASSES, Pass
from passes.result import PassResult
from passes.select import PLAIN, SELECT, Candidate, Table, Target, select
from passes.weight_rows import WEIGHT_ROWS, weight_rows

TABLE: Table = MappingProxyType(
    {
        "attention": (cpu_attention.ATTENTION, *attention_kernels.CANDIDATES),
        "paged_attention": (cpu_attention.PAGED_ATTENTION, Candidate(PLAIN)),
        "weight_dot": (cpu_kernels.WEIGHT_DOT, Candidate(PLAIN)),
        "quantized_dot": (cpu_kernels.QUANTIZED_DOT, Candidate(PLAIN)),
        "top_k": (cpu_kernels.TOP_K, Candidate(PLAIN)),
        **{name: (native, Candidate(PLAIN)) for name, native in cpu_kernels.ROWS.items()},
    }
)
"""Every other operation has one implementation: its meaning."""


def _leave(graph: Graph, counter: Any = None) -> PassResult:
    """What prepares for kernels does nothing where there are none."""
    return PassResult()


def target_notes(target: Target) -> dict[str, str]:
    """What a user must know of the kernels of a target: that the CPU's cannot be used, and what that costs."""
    if target.platform != cpu_kernels.PLATFORM or target.num_devices > 1:
        return {}
    reason = cpu_kernels.refusal(target)
    cost = "products and attention run through XLA, several times slower with quantized weights"
    return {"cpu_kernels": f"{reason}: {cost}"} if reason else {}


TARGET_PASSES = (WEIGHT_ROWS, ATTEND_PAGES, SELECT)
"""The passes that prepare for kernels, and choose them."""


def target_passes(target: Target, cut_of: CutOf | None = None) -> dict[str, Pass]:
    """The passes that depend on what is compiled for.

    Args:
      cut_of: How the devices share each parameter, where there are several.
    """
    shared = f"{target.num_devices} devices" if target.num_devices > 1 else ""
    rows, pages = partial(weight_rows, refusal=partial(cpu_kernels.refuses_rows, target)), attend_pages
    if cpu_kernels.refusal(target):
        rows = pages = _leave
    passes = [
        Pass(WEIGHT_ROWS, rows, Numerics.REASSOCIATES, is_counted=True),
        Pass(ATTEND_PAGES, pages, Numerics.REASSOCIATES, is_counted=True),
        Pass(
            SELECT,
            partial(select, table=TABLE, target=target),
            Numerics.REASSOCIATES,
            is_counted=True,
            detail=f"{target.platform}, {shared}" if shared else target.platform,
        ),
    ]
    if shared:
        merge = partial(merge_projections, num_shards=target.num_devices, cut_of=cut_of)
        passes.append(dataclasses.replace(PASSES["merge_projections"], function=merge, detail=shared))
    return {entry.name: entry for entry in passes}
