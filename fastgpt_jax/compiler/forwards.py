"""The user's forward at several lengths, widened to float32 and compiled once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from passes.cost import graph_cost
from passes.graph import Graph
from passes.replay import Widening, evaluate

WIDE = Widening("float32")
Jit = Callable[[Callable[..., Any]], Callable[..., Any]]


class Forwards:
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
            self._compiled[length] = self.jit(lambda leaves, t: evaluate(graph, [*leaves, t], WIDE)[0][0])
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
