"""Runs a pipeline of passes over a graph: times them, counts what they did, verifies after each, dumps where asked.

The one idea: a pass is a function `Graph -> PassResult` that rewrites in place and knows none of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from passes.cost import Cost, graph_cost
from passes.graph import Graph
from passes.printer import format_graph
from passes.registry import Numerics, Pass
from passes.result import PassResult
from passes.verify import MalformedGraph, verify


@dataclass(frozen=True)
class PassOptions:
    """How a pipeline is run.

    Attributes:
      print_ir_after: `"all"`, `"changed"` (after passes that matched), the name of a pass, or None.
      stop_after: Name of the pass after whose first run the pipeline ends.
      bisect_limit: Number of passes that are run, the rest are skipped: halving it finds the one that breaks a program.
      is_verifying: Whether the graph is verified before the first and after every pass.
    """

    print_ir_after: str | None = None
    stop_after: str | None = None
    bisect_limit: int | None = None
    is_verifying: bool = True


@dataclass(frozen=True)
class PassStatistics:
    """What one run of a pass did."""

    name: str
    numerics: Numerics
    seconds: float
    ops_before: int
    ops_after: int
    cost_before: Cost
    cost_after: Cost
    result: PassResult

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.result.matched} matched, {self.result.missed} missed, "
            f"ops {self.ops_before} -> {self.ops_after}, FLOPs {self.cost_before.flops} -> {self.cost_after.flops}, "
            f"bytes {self.cost_before.bytes} -> {self.cost_after.bytes}, {self.seconds:.3f} s, {self.numerics.value}"
        )


class PassManager:
    """Runs one pipeline. Invariant: holds no state of a run, so that one manager serves many graphs and threads."""

    def __init__(
        self,
        pipeline: Sequence[Pass],
        options: PassOptions = PassOptions(),
        write: Callable[[str], object] = print,
    ):
        """Makes a manager.

        Args:
          write: Receives the text of each dump.

        Raises:
          ValueError: the options name a pass that the pipeline does not have.
        """
        self._pipeline, self._options, self._write = tuple(pipeline), options, write
        names = [entry.name for entry in self._pipeline]
        for option, name in [("print_ir_after", options.print_ir_after), ("stop_after", options.stop_after)]:
            if (
                name is not None
                and name not in names
                and not (option == "print_ir_after" and name in ("all", "changed"))
            ):
                raise ValueError(f"{option} must name a pass of the pipeline {','.join(names)!r}, got {name!r}")

    def run(self, graph: Graph) -> tuple[PassStatistics, ...]:
        """Runs the pipeline over `graph`, in place.

        Raises:
          MalformedGraph: a pass broke the graph; the message names the pass.
        """
        self._verify(graph, "the reader")
        statistics = []
        ops, cost = graph.count(), graph_cost(graph)
        for entry in self._pipeline[: self._options.bisect_limit]:
            start = time.perf_counter()
            result = entry.function(graph)
            seconds = time.perf_counter() - start
            self._verify(graph, f"pass {entry.name}")
            ops_after, cost_after = graph.count(), graph_cost(graph)
            statistics.append(
                PassStatistics(entry.name, entry.numerics, seconds, ops, ops_after, cost, cost_after, result)
            )
            ops, cost = ops_after, cost_after
            self._dump(graph, entry, result)
            if entry.name == self._options.stop_after:
                break
        return tuple(statistics)

    def _verify(self, graph: Graph, culprit: str) -> None:
        if self._options.is_verifying:
            try:
                verify(graph)
            except MalformedGraph as error:
                raise MalformedGraph(f"{culprit} left a malformed graph: {error}") from error

    def _dump(self, graph: Graph, entry: Pass, result: PassResult) -> None:
        wanted = self._options.print_ir_after
        if wanted in ("all", entry.name) or (wanted == "changed" and result.matched):
            self._write(format_graph(graph, f"after {entry.name}"))
