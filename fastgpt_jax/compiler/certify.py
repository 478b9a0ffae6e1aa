"""The certificate: that a model is causal, and that its derived step is the model, on the user's own parameters.

Causality is a matter of values, not of structure: unmasked attention derives without complaint. So every compile
compares, both sides widened to float32 and within 1e-4 of the largest logit:
  `f(t[:n]) == f(t)[:n]` at three lengths (a model of one length is tested by changing later tokens);
  prefill, chunk and decode of the derived step, its memory poisoned beforehand, against `f`.
And it counts: a decode step may cost at most 1.2 times what one more token costs the forward, so nothing is recomputed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from fastgpt_jax.compiler.leak import find_leak, find_length_dependence
from fastgpt_jax.compiler.program import CacheState, Program
from fastgpt_jax.sampling.step_io import StepInputs
from passes import compat
from passes.cost import graph_cost, op_cost
from passes.graph import Graph
from passes.incremental.errors import NotServable
from passes.incremental.expansion import expansion_flops
from passes.incremental.time import Times
from passes.reader import trace
from passes.replay import Widening, evaluate

TOLERANCE = 1e-4
"""Largest difference in parts of the largest logit: float32 sums in another order reach 1e-6 on the models tried."""
MAX_DECODE_RATIO = 1.2
FORWARD_FLOP_BUDGET = 2e11
_PREFILL_CHUNKS = 3
_DECODE_STEPS = 4
_PAGE = 1  # not the first, so that a page is looked up and not assumed
_WIDE = Widening("float32")
Jit = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Certificate:
    """What was compared and how well it agreed.

    Attributes:
      lengths: Lengths at which prefixes were compared, in tokens.
      min_first_chunk: Tokens the first chunk of a request must hold; above 1 for a prefix-LM.
      worst_error: Largest difference between the derived step and the forward, relative to the largest logit.
      decode_flops: FLOPs of a decode step at capacity, without what parameters alone determine, which is made once.
      forward_flops: What one more token costs the forward there.
      expansion_flops: The part of `decode_flops` that expands cached latents (MLA), on top of the bound.
      seconds: Time the certificate took.
    """

    lengths: tuple[int, ...]
    min_first_chunk: int
    worst_error: float
    decode_flops: int
    forward_flops: int
    expansion_flops: int
    seconds: float

    @property
    def decode_ratio(self) -> float:
        """FLOPs of a decode step, without expansions, over those of one more token in the forward."""
        return (self.decode_flops - self.expansion_flops) / max(self.forward_flops, 1)


def certify(
    captured: Captured,
    program: Program,
    leaves: Sequence[Any],
    *,
    seed: int = 0,
    flop_budget: float = FORWARD_FLOP_BUDGET,
) -> Certificate:
    """Certifies a derived program.

    Args:
      leaves: The parameters, arrays.
      flop_budget: FLOPs of the longest forward that is run; above it a shorter length is tested.

    Raises:
      NotServable: the model is not causal, or the step differs from it; names the operation where it can be found.
    """
    start = time.perf_counter()
    flops = count_flops(captured, program)
    _check_flops(*flops)
    try:
        checked = _compare(captured, program, leaves, seed, flop_budget, compat.quick_jit)
    except NotServable:
        # Unoptimized code may round one value twice in two ways, which a comparison with a threshold can see.
        checked = _compare(captured, program, leaves, seed, flop_budget, jax.jit)
    lengths, first_chunk, error = checked
    return Certificate(tuple(lengths), first_chunk, error, *flops, time.perf_counter() - start)


def _compare(
    captured: Captured, program: Program, leaves: Sequence[Any], seed: int, flop_budget: float, jit: Jit
) -> tuple[list[int], int, float]:
    """Returns the lengths compared, the smallest first chunk and the worst error."""
    forwards = _Forwards(captured, leaves, flop_budget, jit)
    lengths = forwards.test_lengths()
    tokens = _test_tokens(lengths[-1], captured.vocab_size, seed)
    whole = forwards.logits(tokens)
    if not np.isfinite(whole).all():
        whole = np.where(np.isfinite(whole), whole, np.nan)
    first_chunk = _check_causal(forwards, tokens, whole, lengths)
    return lengths, first_chunk, _check_step(program, leaves, tokens, whole, first_chunk, jit)


def _check_flops(decode: int, one_more: int, expansion: int) -> None:
    if decode - expansion > MAX_DECODE_RATIO * one_more:
        raise NotServable(
            f"a decode step would cost {decode:,} FLOPs where one more token costs the forward {one_more:,}: "
            "something is computed again for every cached token"
        )


class _Forwards:
    """The forward at several lengths, widened and compiled once each."""

    def __init__(self, captured: Captured, leaves: Sequence[Any], flop_budget: float, jit: Jit):
        self.captured, self.leaves, self.flop_budget, self.jit = captured, leaves, flop_budget, jit
        self._graphs: dict[int, Graph] = {captured.capacity: captured.graph}
        self._compiled: dict[int, Callable[..., Any]] = {}

    def graph(self, length: int) -> Graph | None:
        """The forward at a length, or None where it refuses it."""
        if length not in self._graphs:
            try:
                self._graphs[length] = self.captured.graph_at(length)
            except Exception:
                return None
        return self._graphs[length]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits f32 [T, V] of tokens i32 [T], whose length the forward takes."""
        length = len(tokens)
        if length not in self._compiled:
            graph = self.graph(length)
            if graph is None:
                raise RuntimeError(f"the forward refuses length {length}")
            self._compiled[length] = self.jit(lambda leaves, t: evaluate(graph, [*leaves, t], _WIDE)[0][0])
        with jax.default_matmul_precision("highest"):
            out = self._compiled[length](list(self.leaves), jnp.asarray(tokens)[None])
        return np.asarray(out.astype(jnp.float32))

    def test_lengths(self) -> list[int]:
        """Three lengths the forward takes, ascending; the last is capacity where that is affordable."""
        longest = self._longest()
        wanted = [
            longest * 3 // 8 | 1,
            longest * 5 // 8 | 1,
        ]  # odd where the forward takes it: blocks align with nothing
        out = [n for n in (self._near(w, longest) for w in wanted) if n is not None]
        return [*dict.fromkeys(out), longest]

    def _longest(self) -> int:
        length = self.captured.capacity
        flops = graph_cost(self.captured.graph).flops
        while flops > self.flop_budget and length > 64:
            shorter = self._near(length // 2, length)
            if shorter is None:
                break
            length, flops = shorter, graph_cost(self._graphs[shorter]).flops
        return length

    def _near(self, wanted: int, below: int) -> int | None:
        for multiple in (1, 2, 4, 8, 16, 32, 64, 128):
            length = max(wanted // multiple * multiple, multiple)
            if length < below and self.graph(length) is not None:
                return length
        return None


def _test_tokens(length: int, vocab_size: int, seed: int) -> np.ndarray:
    """Random tokens; the usual padding id 0 does not come first, where masks of tokens leave nothing to attend to."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(min(1, vocab_size - 1), vocab_size, length, dtype=np.int32)
    tokens[rng.integers(0, length, max(1, length // 16))] = 0
    tokens[:2] = np.maximum(tokens[:2], min(1, vocab_size - 1))
    return tokens


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest wanted magnitude; infinite where only one is finite."""
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(got - want)[finite].max() / max(np.abs(want[finite]).max(), 1e-30))


# ------------------------------------------------------------------------------------------ causality
def _check_causal(forwards: _Forwards, tokens: np.ndarray, whole: np.ndarray, lengths: Sequence[int]) -> int:
    """Compares prefixes with the whole; returns the smallest first chunk."""
    shorter = [n for n in lengths[:-1] if difference(forwards.logits(tokens[:n]), whole[:n]) > TOLERANCE]
    changed = [j for j in _change_points(lengths[-1]) if _leaks(forwards, tokens, whole, j)]
    if not shorter and not changed:
        return 1
    prefix = _fixed_prefix(forwards, tokens, lengths)
    if prefix is not None:
        return prefix
    if shorter:
        raise find_length_dependence(forwards.captured, forwards.leaves, tokens, shorter[0])
    raise find_leak(forwards.captured, forwards.leaves, tokens, _changed(forwards, tokens, changed[0]), changed[0])


def _change_points(length: int) -> list[int]:
    return sorted({1, 2, length // 3, length // 2, length - 1} - {0, length})


def _leaks(forwards: _Forwards, tokens: np.ndarray, whole: np.ndarray, at: int) -> bool:
    """Whether changing the tokens from `at` on changes logits before it."""
    return difference(forwards.logits(_changed(forwards, tokens, at))[:at], whole[:at]) > TOLERANCE


def _changed(forwards: _Forwards, tokens: np.ndarray, at: int) -> np.ndarray:
    changed = tokens.copy()
    changed[at:] = 1 + changed[at:] % max(forwards.captured.vocab_size - 1, 1)
    return changed


def _fixed_prefix(forwards: _Forwards, tokens: np.ndarray, lengths: Sequence[int]) -> int | None:
    """The length of a prefix that is read both ways, if it is the same at every length; None otherwise."""
    if len(lengths) < 2:
        return None
    found = set()
    for length in lengths[-2:]:
        whole = forwards.logits(tokens[:length])
        leaking = [j for j in range(1, min(length, 128)) if _leaks(forwards, tokens[:length], whole, j)]
        found.add(max(leaking, default=0) + 1)
    prefix = found.pop()
    if found or prefix * 2 > lengths[-1]:
        return None
    for n in lengths[:-1]:
        if n >= prefix and difference(forwards.logits(tokens[:n]), forwards.logits(tokens)[:n]) > TOLERANCE:
            return None
    return prefix


# ------------------------------------------------------------------------------------------ the step
def _check_step(
    program: Program, leaves: Sequence[Any], tokens: np.ndarray, whole: np.ndarray, first_chunk: int, jit: Jit
) -> float:
    """Serves the tokens in chunks and one by one from poisoned memory; returns the worst error."""
    served = serve_logits(program, leaves, tokens, first_chunk, jit)
    error = difference(served, whole)
    if error > TOLERANCE:
        wrong = np.abs(np.nan_to_num(served, nan=1e30) - np.nan_to_num(whole)).max(axis=1)
        row = int(np.argmax(wrong > TOLERANCE * np.abs(whole[np.isfinite(whole)]).max()))
        raise NotServable(
            f"the derived step differs from the forward by {error:.1e} of the largest logit, first at token {row} of "
            f"{len(tokens)}; the model combines tokens in a way the derivation does not follow"
        )
    return error


def serve_logits(
    program: Program, leaves: Sequence[Any], tokens: np.ndarray, first_chunk: int = 1, jit: Jit = jax.jit
) -> np.ndarray:
    """Logits f32 [T, V] of the derived step in float32: chunks (the last one padded), then single tokens."""
    decode = min(_DECODE_STEPS, max(len(tokens) - first_chunk, 0))
    prefill = len(tokens) - decode
    chunk = max(first_chunk, -(-prefill // _PREFILL_CHUNKS) + 1)
    chunk = min(chunk, prefill)

    step = jit(lambda *args: program.logits(*args, last_row=False, widening=_WIDE))
    program = dataclasses.replace(program, num_pages=_PAGE + 1)
    state, out, start = _poisoned(program.init_state(_WIDE)), [], 0
    with jax.default_matmul_precision("highest"):
        while start < len(tokens):
            size = chunk if start < prefill else 1
            count = min(size, (prefill if start < prefill else len(tokens)) - start)
            logits, state = step(list(leaves), state, _inputs(tokens[start : start + count], size, start))
            out.append(np.asarray(logits[0, :count].astype(jnp.float32)))
            start += count
    return np.concatenate(out)


def _inputs(tokens: np.ndarray, size: int, start: int) -> StepInputs:
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    return StepInputs(
        tokens=jnp.asarray(padded),
        num_new=jnp.asarray([len(tokens)], jnp.int32),
        page_table=jnp.asarray([[_PAGE]], jnp.int32),
        cache_len=jnp.asarray([start], jnp.int32),
        targets=jnp.zeros(size, jnp.int32),
    )


def _poisoned(state: CacheState) -> CacheState:
    """Memory as it may be found: not a number where that exists, else a large number."""

    def poison(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.full_like(x, jnp.nan)
        return jnp.ones_like(x) if x.dtype == bool else jnp.full_like(x, 7)

    return jax.tree.map(poison, state)


# ------------------------------------------------------------------------------------------ FLOPs
def count_flops(captured: Captured, program: Program) -> tuple[int, int, int]:
    """FLOPs of a decode step, of one more token in the forward, and of expanding cached latents."""
    state = jax.eval_shape(program.init_state)
    leaves = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in captured.graph.inputs[:-1]]
    graph, _ = trace(
        lambda p, s, i: program.logits(p, s, i, last_row=False), leaves, state, _inputs(np.zeros(1, np.int32), 1, 0)
    )
    decode = _flops(graph) - _flops_of_parameters(captured.graph, captured.times)
    return decode, _flops_of_one_more(captured), expansion_flops(program.plan)


def _flops_of_one_more(captured: Captured) -> int:
    """FLOPs of the forward at capacity beyond those of a sequence one token shorter."""
    capacity = captured.capacity
    longest = _flops(captured.graph)
    for length in (*(capacity - n for n in (1, 2, 4, 8, 16, 32)), captured.times.short):
        if 0 < length < capacity:
            try:
                return (longest - _flops(captured.graph_at(length))) // (capacity - length)
            except Exception:
                continue
    return (
        2 * longest // capacity
    )  # one length only: FLOPs grow at most with its square, the last token at most twice the mean


def _flops_of_parameters(graph: Graph, times: Times) -> int:
    """FLOPs on values that neither time nor tokens enter."""
    total = 0
    for op in graph.ops:
        if op.name == "scan" and op.regions[0].ops:
            total += op.params["length"] * _flops_of_parameters(op.regions[0], times)
        elif not any(times.dims(v) or times.is_dependent(v) for v in (*op.operands, *op.results)):
            total += op_cost(op).flops
    return total


def _flops(graph: Graph) -> int:
    """FLOPs of a graph with every branch of a `cond` counted, since a step computes them all."""
    total = 0
    for op in graph.ops:
        if op.name == "scan":
            total += op.params["length"] * _flops(op.regions[0])
        elif op.name == "cond":
            total += sum(map(_flops, op.regions))
        else:
            total += op_cost(op).flops
    return total
