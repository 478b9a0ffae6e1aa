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
from fastgpt_jax.compiler.trial_tokens import change_tokens, compared_ids, make_trial_tokens, special_places
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
_MAX_CHANGES = 24
_CHANGE_SHARE = 100  # of the budget of one forward, so that many changes together cost less than it
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
    tokens, whole = _tokens_and_logits(forwards, lengths[-1], seed)
    first_chunk = _check_causal(forwards, tokens, whole, lengths)
    return lengths, first_chunk, _check_step(program, leaves, tokens, whole, first_chunk, jit)


def _tokens_and_logits(forwards: _Forwards, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Test tokens i32 [T] and their logits f32 [T, V].

    A head may be wider than the embedding, where the last ids give no number: then smaller ids are tried.

    Raises:
      NotServable: most rows of the logits hold no number, so that comparing them would show nothing.
    """
    vocab_size, special = forwards.captured.vocab_size, compared_ids(forwards.captured)
    for ids in (vocab_size, max(vocab_size // 2, 1)):
        tokens = make_trial_tokens(length, ids, special, seed)
        whole = forwards.logits(tokens)
        numbers = np.isfinite(whole).any(axis=1)
        if numbers.all():
            return tokens, whole
    if 2 * numbers.sum() < length:
        raise NotServable(
            f"{length - int(numbers.sum())} of {length} rows of the logits hold no finite number on random tokens, so "
            "nothing can be certified; check the parameters"
        )
    return tokens, whole


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


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest logit wanted; infinite where only one is finite.

    What is larger than that, as the fill of -1e9 on ids nobody may choose, is compared with its own magnitude.
    """
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        return float("inf")
    if not finite.any():
        return 0.0
    magnitudes = np.abs(want[finite])
    return float((np.abs(got[finite] - want[finite]) / np.maximum(magnitudes, largest_logit(magnitudes))).max())


def largest_logit(magnitudes: np.ndarray) -> float:
    """The largest magnitude, those left out that lie beyond a whole empty decade: they are fills and no logits."""
    largest = magnitudes.max(initial=1e-30)
    for edge in 10.0 ** np.arange(3, 38):
        if largest < edge:
            break
        ordinary = magnitudes.max(initial=0.0, where=magnitudes < edge)
        if ordinary > 0 and not ((magnitudes >= edge) & (magnitudes < 10 * edge)).any():
            return float(ordinary)
    return float(largest)


# ------------------------------------------------------------------------------------------ causality
def _check_causal(forwards: _Forwards, tokens: np.ndarray, whole: np.ndarray, lengths: Sequence[int]) -> int:
    """Compares prefixes with the whole; returns the smallest first chunk."""
    shorter = [n for n in lengths[:-1] if difference(forwards.logits(tokens[:n]), whole[:n]) > TOLERANCE]
    points = _change_points(forwards, len(tokens))
    changed = [j for j in points if _leaks(forwards, tokens, whole, j)]
    if not shorter and not changed:
        return 1
    prefix = _fixed_prefix(forwards, tokens, lengths, max(changed, default=0))
    if prefix is not None:
        return prefix
    captured = forwards.captured
    if shorter:
        raise find_length_dependence(captured, forwards.leaves, tokens, shorter[0])
    raise find_leak(
        captured, forwards.leaves, tokens, change_tokens(tokens, changed[0], captured.vocab_size), changed[0]
    )


def _change_points(forwards: _Forwards, length: int) -> list[int]:
    """Where later tokens are changed; many places where a forward costs little."""
    graph = forwards.graph(length)
    affordable = 0 if graph is None else forwards.flop_budget / _CHANGE_SHARE / max(graph_cost(graph).flops, 1)
    spread = np.linspace(1, length - 1, int(min(affordable, _MAX_CHANGES)), dtype=int).tolist()
    special = special_places(length, compared_ids(forwards.captured))
    return sorted({1, 2, length // 3, length // 2, length - 1, *special, *spread} - {0, length})


def _leaks(forwards: _Forwards, tokens: np.ndarray, whole: np.ndarray, at: int) -> bool:
    """Whether changing the tokens from `at` on changes logits before it."""
    return (
        difference(forwards.logits(change_tokens(tokens, at, forwards.captured.vocab_size))[:at], whole[:at])
        > TOLERANCE
    )


def _fixed_prefix(forwards: _Forwards, tokens: np.ndarray, lengths: Sequence[int], last_leak: int) -> int | None:
    """The length of a prefix that is read both ways, if it is the same at every length; None otherwise.

    Changes leak from every place within such a prefix and from none behind it, so that its end can be bisected; the
    step is compared with a first chunk of just this length.
    """
    leak, safe = max(last_leak, 1), len(tokens) // 2
    if len(lengths) < 2 or leak >= safe:
        return None
    whole = {n: forwards.logits(tokens[:n]) for n in lengths}

    def leaks(length: int, at: int) -> bool:
        return _leaks(forwards, tokens[:length], whole[length], at)

    if not leaks(lengths[-1], leak) or leaks(lengths[-1], safe):
        return None
    while safe - leak > 1:
        middle = (leak + safe) // 2
        leak, safe = (middle, safe) if leaks(lengths[-1], middle) else (leak, middle)
    for n in lengths[:-1]:
        if n > safe and (difference(whole[n], whole[lengths[-1]][:n]) > TOLERANCE or not leaks(n, leak)):
            return None
    return safe


# ------------------------------------------------------------------------------------------ the step
def _check_step(
    program: Program, leaves: Sequence[Any], tokens: np.ndarray, whole: np.ndarray, first_chunk: int, jit: Jit
) -> float:
    """Serves the tokens in chunks and one by one from poisoned memory; returns the worst error."""
    served = serve_logits(program, leaves, tokens, first_chunk, jit)
    error = difference(served, whole)
    if error > TOLERANCE:
        wrong = np.abs(np.nan_to_num(served, nan=1e30) - np.nan_to_num(whole)).max(axis=1)
        row = int(np.argmax(wrong > TOLERANCE * largest_logit(np.abs(whole[np.isfinite(whole)]))))
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
    first = first_chunk if first_chunk > 1 else chunk

    step = jit(lambda *args: program.logits(*args, last_row=False, widening=_WIDE))
    program = dataclasses.replace(program, num_pages=_PAGE + 1)
    state, out, start = _poisoned(program.init_state(_WIDE)), [], 0
    with jax.default_matmul_precision("highest"):
        while start < len(tokens):
            size = chunk if start < prefill else 1
            end = min(start + (first if start == 0 else size), prefill if start < prefill else len(tokens))
            count = end - start
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
    """FLOPs on values that neither time nor tokens enter; in a loop over time everything is of one token."""
    total = 0
    for op in graph.ops:
        if op.name == "scan" and op.regions[0].ops:
            if not times.moves(op, "length"):
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
