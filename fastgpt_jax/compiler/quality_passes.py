"""What each pass does to what the whole model computes: the change of its logits, and of its quality where it rounds.

The one idea: one graph, the derived step over whole texts, goes through the pipeline of the entry points, and is run
after each pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.artifact.manifest import OutputChange, QualityRecord
from fastgpt_jax.compiler.comparison import difference
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.quality import LogProbs, Windows, compare, log_probs, trace_logits
from passes.extract import clone
from passes.graph import Graph
from passes.numerics import Numerics
from passes.registry import Pass
from passes.replay import evaluate
from passes.result import PassResult

NUM_ROWS = 2
NUM_TOKENS = 32
BATCH_BYTES = 64 << 20
"""Of a batch's log-probabilities, where quality is measured."""
MAX_ROWS = 16
_CHANGING = (Numerics.APPROXIMATE, Numerics.LOSSY)


def changes_by_pass(compiled: Compiled) -> tuple[OutputChange, ...]:
    """The change that each pass of the pipeline makes, in order, on random tokens from a fixed seed."""
    length = min(max(NUM_TOKENS, compiled.min_first_chunk), compiled.max_model_len)
    graph = trace_logits(compiled.program, compiled.store.paths, NUM_ROWS, length)
    tokens = np.random.default_rng(0).integers(0, compiled.vocab_size, (NUM_ROWS, length), dtype=np.int32)
    arguments = [*compiled.leaves, tokens, np.full(NUM_ROWS, length, np.int32)]
    before = _logits(graph, arguments)
    changes: list[OutputChange] = []

    def compare_output(entry: Pass, result: PassResult) -> None:
        nonlocal before
        if not result.matched:
            changes.append(OutputChange(0.0, 0.0))
            return
        after = _logits(graph, arguments)
        changes.append(OutputChange(_largest_difference(after, before), difference(after, before)))
        before = after

    compiled.manager.run(graph, compare_output)
    return tuple(changes)


def measure_quality(compiled: Compiled, windows: Windows, text: str) -> tuple[QualityRecord, ...]:
    """The quality after caches are stored rounded, after each pass that rounds or leaves out, and at the end.

    Args:
      text: What the windows are of, for the records.
    """
    length = windows.tokens.shape[1]
    num_rows = max(1, min(MAX_ROWS, len(windows.tokens), BATCH_BYTES // (4 * length * compiled.vocab_size)))
    paths, leaves = compiled.store.paths, compiled.leaves
    exact = dataclasses.replace(compiled.program, row_format=None)
    reference = log_probs(trace_logits(exact, paths, num_rows, length), leaves)
    graph = trace_logits(compiled.program, paths, num_rows, length)
    stages: list[tuple[str, LogProbs]] = []
    if compiled.program.row_format is not None:
        stages.append((f"kv_cache_dtype {compiled.config.kv_cache_dtype}", log_probs(clone(graph), leaves)))
    is_told = compiled.program.row_format is not None  # the last stage is what is served

    def keep_stage(entry: Pass, result: PassResult) -> None:
        nonlocal is_told
        if not result.matched:
            return
        if entry.numerics in _CHANGING:
            stages.append((f"{entry.name} {entry.detail}".strip(), log_probs(clone(graph), leaves)))
        is_told = entry.numerics in _CHANGING or (is_told and entry.numerics is Numerics.EXACT)

    compiled.manager.run(graph, keep_stage)
    if not is_told:
        stages.append(("all passes", log_probs(graph, leaves)))
    found = compare(reference, [run for _, run in stages], windows, num_rows)
    return tuple(
        QualityRecord(name, text, **dataclasses.asdict(quality))
        for (name, _), quality in zip(stages, found, strict=True)
    )


def _logits(graph: Graph, arguments: list[Any]) -> np.ndarray:
    snapshot = clone(graph)
    (logits,) = jax.jit(lambda args: evaluate(snapshot, args))(arguments)
    return np.asarray(logits.astype(jnp.float32))


def _largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        return float("inf")
    return float(np.abs(got[finite] - want[finite]).max(initial=0.0))
