"""One entry point of a served model: a step of fixed shape, rewritten, split by binding time, compiled.

The one idea: tracing is apart from compiling, so that what a program is can be known (its cost, its portable form, what
to call it) before XLA spends its time, or without.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.step import Step, flatten_outputs, input_shapes, unflatten_inputs
from fastgpt_jax.compiler.distribution import Distribution
from fastgpt_jax.compiler.kernel_choice import TABLE
from fastgpt_jax.compiler.packing import PackedStore
from fastgpt_jax.compiler.program import Program
from passes import compat
from passes.binding_time import split
from passes.cost import Cost, graph_cost
from passes.drop_placement import drop_placement
from passes.extract import clone
from passes.graph import Graph
from passes.lift_constants import lift_constants
from passes.manager import PassManager, PassStatistics
from passes.reader import trace
from passes.replay import evaluate
from passes.select import deselect, unportable


@dataclasses.dataclass(frozen=True)
class TracedEntryPoint:
    """A step after the passes, not compiled.

    Attributes:
      jitted: `(state, weights, inputs) -> (outputs, state)` over flat lists, the state donated.
      arguments: Shapes of `jitted`'s arguments, with their shardings where they have any.
      portable: The same function with no word of where anything lies.
      weights: Names of the weights it reads, in order.
      passes: What each pass of the pipeline did.
      cost: FLOPs and bytes of a step after the passes.
      native: The operations that run as code of one platform, in order; `portable` has their meanings instead.
    """

    key: EntryPointKey
    jitted: Any
    arguments: tuple[list[Any], list[Any], list[Any]]
    portable: Any
    weights: tuple[str, ...]
    passes: tuple[PassStatistics, ...]
    cost: Cost
    native: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """A compiled step.

    Attributes:
      seconds: Time that XLA took.
    """

    traced: TracedEntryPoint
    compiled: jax.stages.Compiled
    seconds: float

    def bind(self, store: PackedStore) -> Step:
        """The step with its weights."""
        return Step(self.traced.key, self.compiled, [store[name] for name in self.traced.weights])


def trace_entry_point(
    key: EntryPointKey,
    program: Program,
    store: PackedStore,
    manager: PassManager,
    distribution: Distribution,
    max_model_len: int,
    max_logprobs: int,
) -> TracedEntryPoint:
    """Traces a step, runs the passes, and makes the weights it needs."""
    params = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.graph.inputs[:-1]]
    state_shapes, state_tree = (
        distribution.state_shapes(program),
        jax.tree.structure(jax.eval_shape(program.init_state)),
    )
    pages = program.layout().pages_per_request(max_model_len)
    inputs = distribution.whole(input_shapes(key, program.graph.outputs[0].shape[-1], max_model_len, pages))

    def step(leaves: Any, state: list[Any], flat: list[Any]) -> list[Any]:
        step_inputs, sampler = unflatten_inputs(key, flat)
        outputs, after = program.step(
            leaves,
            jax.tree.unflatten(state_tree, state),
            step_inputs,
            sampler,
            variant=key.variant,
            score=key.score,
            max_logprobs=max_logprobs,
            whole=distribution.sharding(),
        )
        return [*jax.tree.leaves(after), *flatten_outputs(outputs)]

    graph, _ = trace(step, params, state_shapes, inputs)
    for value, path in zip(graph.inputs, store.paths, strict=False):
        value.path = path
    statistics = manager.run(graph)
    num_dynamic = len(graph.inputs) - len(params)
    constants = lift_constants(graph)
    parts = split(graph, [True] * len(params) + [False] * num_dynamic + [True] * len(constants))
    weights = store.fetch(parts.prepare, constants)
    # State comes out as it went in, so that its memory is used again.
    shardings = (distribution.sharding(), [x.sharding for x in state_shapes])
    flat_step = _flat_step(parts.step, parts.prepare, len(state_shapes))
    jitted = jax.jit(flat_step, donate_argnums=0, out_shardings=shardings)
    weight_shapes = distribution.placed([store[name] for name in weights])
    return TracedEntryPoint(
        key,
        jitted,
        (state_shapes, weight_shapes, inputs),
        _portable(parts.step, parts.prepare, len(state_shapes)),
        tuple(weights),
        statistics,
        graph_cost(parts.step),
        tuple(op.name for op in unportable(parts.step, TABLE)),
    )


def compile_entry_point(traced: TracedEntryPoint) -> EntryPoint:
    """Lets XLA compile a traced step."""
    start = time.perf_counter()
    compiled = traced.jitted.lower(*traced.arguments).compile()
    return EntryPoint(traced, compiled, time.perf_counter() - start)


def _portable(step: Graph, prepare: Graph, num_state: int) -> Any:
    step = clone(step)
    drop_placement(step)
    deselect(step, TABLE)
    return jax.jit(_flat_step(step, prepare, num_state), donate_argnums=0)


def _flat_step(step: Graph, prepare: Graph, num_state: int) -> Any:
    """The step as a function of flat lists; PRNG keys among the weights come as the numbers they are made of."""
    packed_dtypes = [value.dtype for value in prepare.outputs]

    def run_step(state: list[Any], weights: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        packed = [compat.wrap_key_data(x, dtype) for x, dtype in zip(weights, packed_dtypes, strict=True)]
        results = evaluate(step, [*packed, *state, *inputs])
        return results[num_state:], results[:num_state]

    return run_step
