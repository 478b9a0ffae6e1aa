"""The X-ray of a model: its decode step before and after each pass, beside the lines it came from; data, not text.

Needs shapes only. Knows no output format (`fastgpt_jax/cli/xray_*.py` write text, JSON and the page). The one idea: the
passes run one by one over one graph, and an operation that is there after a pass and was not before, or has other
parameters, is that pass's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.manifest import Manifest, PassRecord, WorkRecord
from fastgpt_jax.artifact.step import flatten_outputs, input_shapes, unflatten_inputs
from fastgpt_jax.checkpoint import LoadedModel
from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.compiler.compile import leaf_paths, unrolls_layers
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.listing import Listing, make_listing, mark_gone
from fastgpt_jax.compiler.mask_pictures import Masks, draw_masks
from fastgpt_jax.compiler.program import Program, make_program
from fastgpt_jax.compiler.quantization import make_pipeline, tell_unused
from fastgpt_jax.compiler.roofline import Bound, Machine
from fastgpt_jax.compiler.sparsity import check_sparsity, read_sparsity, with_sparsity
from fastgpt_jax.sampling.step_io import StepInputs
from passes.cse import param_key
from passes.graph import Graph, Op
from passes.incremental.derive import derive
from passes.incremental.row_format import ROW_FORMATS
from passes.manager import PassManager, PassOptions, PassStatistics
from passes.reader import trace
from passes.registry import Pass

DERIVED = "derived"
"""Name of the stage before any pass."""
_AROUND = 2
"""Lines shown before and after one that made an operation."""
_STEP_INPUTS = tuple(field.name for field in fields(StepInputs) if field.name != "targets")


@dataclass(frozen=True)
class Stage:
    """The step after a pass.

    Attributes:
      name: Of the pass; `derived` before the first.
      made: Rewrites and decisions that it reports, with how often each was made.
      missed: What nearly matched, and why it did not.
      listing: None where only counts are known, as of an artifact.
    """

    name: str
    numerics: str
    seconds: float
    matched: int
    made: tuple[tuple[str, int], ...]
    missed: tuple[str, ...]
    num_ops: int
    flops: int
    nbytes: int
    listing: Listing | None


@dataclass(frozen=True)
class SourceFile:
    """The lines of a file that made operations, and those around them; none where it cannot be read."""

    path: str
    lines: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class CompiledStep:
    """The step as XLA compiled it.

    Attributes:
      flops, nbytes: Of a run, counted in the compiled module.
      bound: What it waits for.
      seconds: The least time of a step.
      libraries: What a library runs, with how often.
      unknown_loops: Loops that are counted once, since their trips are not known.
    """

    flops: int
    nbytes: int
    bound: Bound
    seconds: float
    libraries: tuple[tuple[str, int], ...]
    unknown_loops: tuple[str, ...]


@dataclass(frozen=True)
class XRay:
    """All that is shown.

    Attributes:
      compiled: Of an artifact; None for a model that is not compiled.
      step: The entry point looked at.
      num_params: None where it is not known.
      machine: What the roofline is of.
      notes: What became of rules and clauses that were asked for.
    """

    name: str
    step: str
    num_params: int | None
    capacity: int
    cache: CacheLayout
    machine: Machine
    stages: tuple[Stage, ...]
    sources: tuple[SourceFile, ...]
    masks: Masks
    compiled: CompiledStep | None = None
    notes: tuple[str, ...] = ()


def xray(
    model: Any,
    params: Any = None,
    config: CompileConfig = CompileConfig(max_model_len=512),
    *,
    name: str,
    machine: Machine,
    num_requests: int = 1,
    pipeline: Sequence[Pass] | None = None,
) -> XRay:
    """Looks through a model.

    Args:
      model: As for `compile`.
      params: Arrays or `ShapeDtypeStruct`s.
      num_requests: Requests of the decode step.
      pipeline: The passes; by default those of the configuration.

    Raises:
      NotServable: the model has no exact cached step.
      UserError: the forward cannot be traced at all, or what the configuration asks for does not fit it.
    """
    if isinstance(model, LoadedModel):
        model = model.model
    forward, params = as_forward(model, params, config.arguments)
    captured = capture(forward, params, config.max_model_len or 512)
    notes = [tell_unused(captured.graph, leaf_paths(params), config.quantization_rules, is_strict=config.is_strict)]
    plan = derive(captured.graph, captured.times, captured.token_input)
    unroll, num_layers = unrolls_layers(config), None
    if config.sparse is not None:
        num_layers, note = check_sparsity(captured.graph, config.sparse, is_unrolled=unroll, is_strict=config.is_strict)
        notes.append(note)
    program = make_program(captured.graph, plan, num_slots=num_requests, unroll=unroll, page_size=config.page_size)
    program = replace(program, row_format=ROW_FORMATS.get(config.kv_cache_dtype))
    key = EntryPointKey(num_requests, num_requests, "greedy", False)
    names = leaf_paths(params)
    graph = _trace_step(program, key, captured.capacity, config.max_logprobs, names)
    is_static = [i < len(names) for i in range(len(graph.inputs))]
    entries = sorted(program.layout().entries, key=lambda entry: entry.kind != "kv")  # as the state is laid out
    for entry in entries:
        names += [entry.name] if entry.scale_dtype is None else [entry.name, f"scales of {entry.name}"]
    names += _STEP_INPUTS
    files: dict[str, int] = {}
    if pipeline is None:
        pipeline = make_pipeline(config.pipeline, config.quantization, config.quantization_rules)
        pipeline = with_sparsity(pipeline, config.sparse, captured.capacity, num_layers)
    stages = _run_passes(graph, pipeline, names, is_static, machine, files)
    leaves = jax.tree.leaves(params)
    return XRay(
        name,
        key.name,
        int(sum(np.prod(np.shape(x), dtype=np.int64) for x in leaves)),
        captured.capacity,
        program.layout(),
        machine,
        tuple(stages),
        _read_sources(files, stages),
        draw_masks(captured, None if config.sparse is None else read_sparsity(config.sparse)),
        notes=tuple(note for note in notes if note is not None),
    )


def xray_artifact(manifest: Manifest, machine: Machine) -> XRay:
    """What an artifact's manifest tells: its cache, and what each pass did to a decode step."""
    record = min(manifest.entry_points, key=lambda e: (e.key.chunk_len, e.key.num_requests, e.key.variant == "full"))
    first = record.passes[0] if record.passes else None
    stages = [] if first is None else [Stage(DERIVED, "", 0.0, 0, (), (), *_counts(first, 0), None)]
    for run in record.passes:
        made = tuple((note, 1) for note in run.notes)
        stages.append(
            Stage(run.name, run.numerics, run.seconds, run.matched, made, run.remarks, *_counts(run, 1), listing=None)
        )
    notes = ("an artifact holds no forward: inspect the model that it was compiled from to see its masks",)
    return XRay(
        manifest.model.name,
        record.key.name,
        None,
        manifest.model.max_model_len,
        manifest.layout,
        machine,
        tuple(stages),
        (),
        Masks((), notes),
        _compiled_step(record.program.work, machine),
    )


def _compiled_step(work: WorkRecord, machine: Machine) -> CompiledStep:
    return CompiledStep(
        work.flops,
        work.nbytes,
        machine.bound(work.flops, work.nbytes),
        machine.seconds(work.flops, work.nbytes),
        tuple(sorted(work.libraries.items())),
        work.unknown_loops,
    )


def _counts(run: PassRecord, when: int) -> tuple[int, int, int]:
    return run.ops[when], run.flops[when], run.nbytes[when]


def _trace_step(program: Program, key: EntryPointKey, capacity: int, max_logprobs: int, paths: Sequence[str]) -> Graph:
    """The graph of a step, whose inputs are the parameters, the state and what a call brings."""
    params = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.graph.inputs[:-1]]
    state_shapes, state_tree = jax.tree.flatten(jax.eval_shape(program.init_state))
    vocab_size = program.graph.outputs[0].shape[-1]

    def step(leaves: Any, state: list[Any], flat: list[Any]) -> list[Any]:
        inputs, sampler = unflatten_inputs(key, flat)
        before = jax.tree.unflatten(state_tree, state)
        most = min(max_logprobs, vocab_size)
        outputs, after = program.step(
            leaves, before, inputs, sampler, variant=key.variant, score=False, max_logprobs=most
        )
        return [*jax.tree.leaves(after), *flatten_outputs(outputs)]

    pages = program.layout().pages_per_request(capacity)
    graph, _ = trace(step, params, state_shapes, input_shapes(key, vocab_size, capacity, pages))
    for value, path in zip(graph.inputs, paths, strict=False):
        value.path = path
    return graph


def _run_passes(
    graph: Graph,
    pipeline: Sequence[Pass],
    names: Sequence[str],
    is_static: Sequence[bool],
    machine: Machine,
    files: dict[str, int],
) -> list[Stage]:
    made_by: dict[Op, str] = {}
    listing, ops = make_listing(graph, names, is_static, machine, files, made_by)
    stages = [Stage(DERIVED, "", 0.0, 0, (), (), listing.num_ops, listing.flops, listing.nbytes, listing)]
    for entry in pipeline:
        before = {op: _state_of(op) for _, op in graph.walk()}
        (run,) = PassManager([entry], PassOptions(on_invalid="skip")).run(graph)
        left = {op for _, op in graph.walk()}
        made_by.update({op: entry.name for op in left if before.get(op) != _state_of(op)})
        stages[-1] = replace(stages[-1], listing=mark_gone(listing, ops, left))
        listing, ops = make_listing(graph, names, is_static, machine, files, made_by)
        stages.append(_stage(run, listing))
    return stages


def _state_of(op: Op) -> Any:
    """What a pass changes when it changes an operation; that an operand is made by another is not its change."""
    return op.name, param_key(op.params)


def _stage(run: PassStatistics, listing: Listing) -> Stage:
    made = Counter(map(str, (*run.result.rewrites, *run.result.notes)))
    missed = tuple(dict.fromkeys(map(str, run.result.remarks)))
    return Stage(
        run.name,
        run.numerics.value,
        run.seconds,
        run.result.matched,
        tuple(made.items()),
        missed,
        listing.num_ops,
        listing.flops,
        listing.nbytes,
        listing,
    )


def _read_sources(files: dict[str, int], stages: Sequence[Stage]) -> tuple[SourceFile, ...]:
    wanted: dict[int, set[int]] = {number: set() for number in files.values()}
    for stage in stages:
        for row in stage.listing.rows if stage.listing is not None else ():
            if row.source is not None:
                file, line = row.source
                wanted[file].update(range(line - _AROUND, line + _AROUND + 1))
    return tuple(SourceFile(path, _read_lines(path, wanted[number])) for path, number in files.items())


def _read_lines(path: str, wanted: set[int]) -> tuple[tuple[int, str], ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple((n, lines[n - 1]) for n in sorted(wanted) if 0 < n <= len(lines))
