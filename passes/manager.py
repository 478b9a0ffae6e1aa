"""Runs a pipeline of passes over a graph: times them, counts what they did, verifies and validates after each, dumps
where asked.

The one idea: a pass is a function `Graph -> PassResult` that rewrites in place and knows none of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from passes.cost import Cost, step_cost
from passes.extract import clone
from passes.graph import Graph
from passes.printer import format_graph
from passes.registry import Numerics, Pass
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter
from passes.validation import InvalidRewrite, Validation, Validator
from passes.verify import MalformedGraph, verify


@dataclass(frozen=True)
class PassOptions:
    """How a pipeline is run.

    Attributes:
      print_ir_after: `"all"`, `"changed"` (after passes that matched), the name of a pass, or None.
      stop_after: Name of the pass after whose first run the pipeline ends.
      bisect_limit: Number of rewrites that are made, the rest are skipped: halving it finds the one that breaks a
        program. A pass that does not count its rewrites is one.
      is_verifying: Whether the graph is verified before the first and after every pass.
      is_validating: Whether the rewrites that a pass reports are run against what they replaced.
      on_invalid: What becomes of a pass with a rewrite that computes something else: `"error"` ends the compile,
        `"skip"` puts back the graph as it was before the pass.
    """

    print_ir_after: str | None = None
    stop_after: str | None = None
    bisect_limit: int | None = None
    is_verifying: bool = True
    is_validating: bool = True
    on_invalid: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class PassStatistics:
    """What one run of a pass did.

    Attributes:
      seconds: Of the pass itself; validating its rewrites is not in it.
      cost_before, cost_after: Of a step: what parameters alone determine is not in them.
      validations: The verdict on each of `result.rewrites`.
    """

    name: str
    numerics: Numerics
    seconds: float
    ops_before: int
    ops_after: int
    cost_before: Cost
    cost_after: Cost
    result: PassResult
    validations: tuple[Validation, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.result.matched} matched, {self.result.missed} missed, "
            f"ops {self.ops_before} -> {self.ops_after}, FLOPs {self.cost_before.flops} -> {self.cost_after.flops}, "
            f"bytes {self.cost_before.bytes} -> {self.cost_after.bytes}, {self.seconds:.3f} s, {self.numerics.value}"
        )


class PassManager:
    """Runs one pipeline. Invariant: holds no state of a run, so that one manager serves many graphs and threads; of
    rewrites it remembers the verdicts, so that each distinct one is validated once.
    """

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
        self._validator = Validator()
        names = [entry.name for entry in self._pipeline]
        for option, name in [("print_ir_after", options.print_ir_after), ("stop_after", options.stop_after)]:
            if (
                name is not None
                and name not in names
                and not (option == "print_ir_after" and name in ("all", "changed"))
            ):
                raise ValueError(f"{option} must name a pass of the pipeline {','.join(names)!r}, got {name!r}")

    def run(
        self, graph: Graph, after: Callable[[Pass, PassResult], object] = lambda entry, result: None
    ) -> tuple[PassStatistics, ...]:
        """Runs the pipeline over `graph`, in place.

        Args:
          after: Called after each pass, when the graph is what the pass left.

        Raises:
          MalformedGraph: a pass broke the graph; the message names the pass.
          InvalidRewrite: a rewrite computes something else, and nothing says to go on; the message names its rule.
        """
        self._verify(graph, "the reader")
        statistics, counter = [], RewriteCounter(self._options.bisect_limit)
        ops, cost = graph.count(), step_cost(graph)
        for entry in self._pipeline:
            if counter.is_exhausted:
                break
            result, validations, seconds = self._run_pass(entry, graph, counter)
            ops_after, cost_after = graph.count(), step_cost(graph)
            statistics.append(
                PassStatistics(
                    entry.name,
                    entry.numerics,
                    seconds,
                    ops,
                    ops_after,
                    cost,
                    cost_after,
                    result,
                    validations,
                    entry.detail,
                )
            )
            ops, cost = ops_after, cost_after
            self._dump(graph, entry, result)
            after(entry, result)
            if entry.name == self._options.stop_after:
                break
        if self._options.bisect_limit is not None and counter.made:
            self._write(f"bisect: {len(counter.made)} rewrites made, the last is {counter.made[-1]}")
        return tuple(statistics)

    def _run_pass(
        self, entry: Pass, graph: Graph, counter: RewriteCounter
    ) -> tuple[PassResult, tuple[Validation, ...], float]:
        """One pass, verified and validated; put back where that is what to do with an invalid one."""
        saved = clone(graph) if self._options.on_invalid == "skip" and self._options.is_validating else None
        start = time.perf_counter()
        if entry.is_counted:
            result = entry.function(graph, counter)
        else:
            counter.allows(entry.name)
            result = entry.function(graph)
        seconds = time.perf_counter() - start
        self._verify(graph, f"pass {entry.name}")
        if not self._options.is_validating:
            return result, (), seconds
        validations = tuple(map(self._validator.check, result.rewrites))
        pairs = zip(result.rewrites, validations, strict=True)
        invalid = next(((rewrite, found) for rewrite, found in pairs if found.status == "invalid"), None)
        if invalid is None:
            return result, validations, seconds
        message = _describe(entry, *invalid)
        if saved is None:
            raise InvalidRewrite(f"{message}; on_invalid='skip' leaves the pass out")
        _restore(graph, saved)
        remark = Remark(f"left out: {message}", entry.name, invalid[0].source)
        return PassResult(0, (*result.remarks, remark)), (), seconds

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


def _describe(entry: Pass, rewrite: Rewrite, found: Validation) -> str:
    return f"rewrite {rewrite} of pass {entry.name} is invalid: {found.where}"


def _restore(graph: Graph, saved: Graph) -> None:
    """Makes a graph what it was when it was cloned; its inputs stay the values that they are."""
    saved.replace(dict(zip(saved.inputs, graph.inputs, strict=True)))
    graph.ops, graph.outputs = saved.ops, saved.outputs
