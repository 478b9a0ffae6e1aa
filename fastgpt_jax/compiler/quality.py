"""How far the next-token distributions of a rewritten model are from the exact model's, over whole texts.

Knows no pass. The one idea: both are the derived step run over windows of text from empty caches, what is stored of
rows included, so that all that a compile changes can show and nothing else does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.program import Program
from fastgpt_jax.sampling.step_io import StepInputs
from passes.graph import Graph
from passes.reader import trace
from passes.replay import evaluate

LogProbs = Callable[[np.ndarray, np.ndarray], Any]
"""Tokens `[R, T]` and counts `[R]` to log-probabilities float32 `[R, T, V]`."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids `[N, T]`, each row a text of its own, padded past its count."""

    tokens: np.ndarray
    counts: np.ndarray

    @property
    def is_valid(self) -> np.ndarray:
        return np.arange(self.tokens.shape[1]) < self.counts[:, None]

    @property
    def following(self) -> np.ndarray:
        """At each valid position, one after the other, the token that comes next; -1 at the end of a text."""
        has_next = np.arange(1, self.tokens.shape[1] + 1) < self.counts[:, None]
        return np.where(has_next, np.roll(self.tokens, -1, 1), -1)[self.is_valid]

    def batches(self, size: int) -> list[Windows]:
        """Windows in groups of `size`; the last is filled up with empty ones."""
        missing = -len(self.tokens) % size
        tokens, counts = np.pad(self.tokens, ((0, missing), (0, 0))), np.pad(self.counts, (0, missing))
        return [Windows(tokens[i : i + size], counts[i : i + size]) for i in range(0, len(tokens), size)]


def pad_windows(rows: Sequence[Sequence[int]], length: int) -> Windows:
    """Texts of at most `length` tokens side by side."""
    tokens = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Windows(tokens, np.array([len(ids) for ids in rows], np.int32))


def cut_windows(ids: Sequence[int], length: int, first_id: int | None) -> Windows:
    """A long text in windows of `length` tokens, each with `first_id` before it where there is one."""
    first = [] if first_id is None else [first_id]
    step = length - len(first)
    return pad_windows([[*first, *ids[i : i + step]] for i in range(0, len(ids), step)], length)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Distances from the exact model over positions of text, in nats.

    Attributes:
      mean_kld: Divergence of the next-token distribution from the exact model's, `KL(exact || found)`.
      kld_999: That which one position of a thousand exceeds.
      same_top1: Share of positions with the same likeliest token.
      perplexity: Of the tokens of the text, each window's first left out.
    """

    num_tokens: int
    mean_kld: float
    kld_999: float
    same_top1: float
    perplexity: float


class Comparison:
    """Gathers one model's distances, batch by batch."""

    def __init__(self) -> None:
        self._klds: list[np.ndarray] = []
        self._same: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

    def add(self, exact: np.ndarray, found: np.ndarray, windows: Windows) -> None:
        """Adds the log-probabilities `[R, T, V]` of both at the windows."""
        exact, found = (x[windows.is_valid] for x in (exact, found))
        with np.errstate(invalid="ignore"):  # what is impossible in both
            terms = np.exp(exact) * (exact - found)
        self._klds.append(np.sum(np.where(np.isneginf(exact), 0, terms), axis=-1))
        self._same.append(exact.argmax(-1) == found.argmax(-1))
        following = windows.following
        scored = following >= 0
        self._losses.append(-found[scored, following[scored]])

    def result(self) -> Quality:
        """What was gathered."""
        klds, same, losses = (np.concatenate(x) for x in (self._klds, self._same, self._losses))
        method = "linear" if np.isfinite(klds).all() else "higher"  # nothing lies between a number and infinity
        return Quality(
            len(klds),
            float(np.mean(klds)),
            float(np.quantile(klds, 0.999, method=method)),
            float(np.mean(same)),
            float(np.exp(np.mean(losses))) if len(losses) else float("nan"),
        )


def trace_logits(program: Program, paths: Sequence[str], num_rows: int, length: int) -> Graph:
    """The derived step as a graph from parameters, tokens `[R, T]` and counts `[R]` to the logits of all positions.

    Each row is a request of its own with an empty cache. The parameters carry their paths, as passes expect.
    """
    num_pages = -(-program.plan.capacity // program.page_size)
    small = dataclasses.replace(program, num_slots=num_rows, num_pages=num_rows * num_pages)

    def logits(leaves: list[Any], tokens: Any, counts: Any) -> Any:
        slots = jnp.arange(num_rows, dtype=jnp.int32)
        inputs = StepInputs(
            tokens=tokens.reshape(-1),
            num_new=counts,
            page_table=slots[:, None] * num_pages + jnp.arange(num_pages, dtype=jnp.int32),
            cache_len=jnp.zeros(num_rows, jnp.int32),
            slots=slots,
            targets=jnp.zeros(tokens.size, jnp.int32),
        )
        return small.logits(leaves, small.init_state(), inputs, last_row=False)[0]

    leaves = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.graph.inputs[:-1]]
    tokens = jax.ShapeDtypeStruct((num_rows, length), jnp.int32)
    graph, _ = trace(logits, leaves, tokens, jax.ShapeDtypeStruct((num_rows,), jnp.int32))
    for value, path in zip(graph.inputs, paths, strict=False):
        value.path = path
    return graph


def log_probs(graph: Graph, leaves: Sequence[Any]) -> LogProbs:
    """Compiles a graph of `trace_logits` that passes may have rewritten."""

    @jax.jit
    def run(leaves: Sequence[Any], tokens: Any, counts: Any) -> Any:
        (logits,) = evaluate(graph, [*leaves, tokens, counts])
        return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    return lambda tokens, counts: run(leaves, tokens, counts)


def compare(exact: LogProbs, others: Sequence[LogProbs], windows: Windows, num_rows: int) -> list[Quality]:
    """The distances of several models from the exact one, which runs once a batch of `num_rows` windows."""
    comparisons = [Comparison() for _ in others]
    for batch in windows.batches(num_rows):
        want = np.asarray(exact(batch.tokens, batch.counts))
        for other, comparison in zip(others, comparisons, strict=True):
            comparison.add(want, np.asarray(other(batch.tokens, batch.counts)), batch)
    return [comparison.result() for comparison in comparisons]
