"""One entry point of a served model: a step of fixed shape, rewritten, split by binding time, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from fastgpt_jax.compiler.packing import PackedStore
from fastgpt_jax.compiler.program import CacheState, Program
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from passes.binding_time import split
from passes.cost import Cost, graph_cost
from passes.manager import PassManager, PassStatistics
from passes.reader import trace
from passes.replay import evaluate


@dataclass(frozen=True)
class EntryPointKey:
    """What tells entry points apart: T tokens of R requests, the sampler, and whether given tokens are scored."""

    num_tokens: int
    num_requests: int
    variant: str
    score: bool


@dataclass(frozen=True)
class EntryPoint:
    """A compiled step.

    Attributes:
      run: `(state, inputs, sampler) -> (outputs, state)`; the state passed in is donated.
      passes: What each pass of the pipeline did.
      cost: FLOPs and bytes of a step after the passes.
    """

    key: EntryPointKey
    run: Callable[[CacheState, StepInputs, SamplerInputs], tuple[StepOutputs, CacheState]]
    passes: tuple[PassStatistics, ...]
    cost: Cost


def build_entry_point(
    key: EntryPointKey,
    program: Program,
    store: PackedStore,
    leaves: Sequence[Any],
    manager: PassManager,
    example: tuple[CacheState, StepInputs, SamplerInputs],
    max_logprobs: int,
) -> EntryPoint:
    """Traces a step at the shapes of `example`, runs the passes and splits it; XLA compiles it when it first runs."""

    def step(leaves: Any, state: Any, inputs: Any, sampler: Any) -> Any:
        options = {"variant": key.variant, "score": key.score, "max_logprobs": max_logprobs}
        return program.step(leaves, state, inputs, sampler, **options)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example)
    params = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.graph.inputs[:-1]]
    graph, out_tree = trace(step, params, *shapes)
    statistics = manager.run(graph)
    rest = len(graph.inputs) - len(params)
    parts = split(graph, [True] * len(params) + [False] * rest)
    packed = store.fetch(parts.prepare)

    def run_flat(state: Any, packed: Any, inputs: Any, sampler: Any) -> Any:
        args = [*packed, *jax.tree.leaves(state), *jax.tree.leaves((inputs, sampler))]
        return jax.tree.unflatten(out_tree, evaluate(parts.step, args))

    compiled = jax.jit(run_flat, donate_argnums=0)
    return EntryPoint(
        key, lambda state, inputs, sampler: compiled(state, packed, inputs, sampler), statistics, graph_cost(parts.step)
    )
