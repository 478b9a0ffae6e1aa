"""Lets the engines of a contest take turns, each at the fastest of its settings, beside the memory bandwidth.

Knows no engine and no table. The one idea: a round asks every engine for every measure once, in an order that turns
round by round, so that no engine has the quiet moments to itself; a median over rounds is then a fair figure.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from benchmarks.peers.contests import OURS, Contestant, Measure
from benchmarks.peers.protocol import EngineFailed

SETTLE_S = 0.3
"""Between two engines: some libraries' idle threads spin for 0.2 s after the last work."""


class Asked(Protocol):
    """What turns need of a worker."""

    def wait_until_ready(self) -> dict[str, Any]: ...

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


Row = dict[str, Any]
Start = Callable[[Contestant, Mapping[str, Any]], Asked]


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A contestant's process with one of its settings."""

    contestant: Contestant
    variant: Mapping[str, Any]
    worker: Asked

    def ask(self, measure: Measure, seed: int, steps: int) -> float:
        """Seconds of a measurement."""
        return float(self.worker.ask(measure.kind, **measure.arguments(seed, steps))["seconds"])

    def row(self, kind: str, **more: Any) -> Row:
        """Something that happened to it."""
        return {"row": kind, "contestant": self.contestant.label, "variant": dict(self.variant), **more}


class Field:
    """The contestants of one contest, with the process that serves each measure."""

    def __init__(
        self, start: Start, bandwidth: Callable[[], float], *, steps: Mapping[int, int], settle_s: float = SETTLE_S
    ):
        self._start, self._bandwidth, self._steps, self._settle_s = start, bandwidth, steps, settle_s
        self._serving: dict[tuple[str, str, int], Loaded] = {}
        self._open: list[Asked] = []

    def run(self, contestants: Sequence[Contestant], measures: Sequence[Measure], rounds: int) -> Iterator[Row]:
        """Tries every contestant's settings, then lets them take turns; yields a row of whatever happens."""
        for contestant in contestants:
            yield from self._enter(contestant, measures)
        yield from self._take_turns([c.label for c in contestants], measures, rounds)

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._open:
            worker.close()

    def _enter(self, contestant: Contestant, measures: Sequence[Measure]) -> Iterator[Row]:
        """Tries settings one process after the other, and keeps those that are fastest at something."""
        best: dict[tuple[str, int], float] = {}
        fastest: dict[tuple[str, int], Loaded] = {}
        opened: list[Loaded] = []
        tried = [m for m in measures if m.size == m.tried and m.kind != "bare_decode"]
        tried += [m for m in measures if m.kind == "prefill" and m.tried not in {n.size for n in measures}]
        for variant in contestant.variants:
            worker = self._start(contestant, variant)
            self._open.append(worker)
            loaded = Loaded(contestant, variant, worker)
            opened.append(loaded)
            try:
                yield loaded.row("about", about=worker.wait_until_ready())
            except EngineFailed as error:
                yield loaded.row("failed", measure="load", why=str(error))
                worker.close()
                continue
            for measure in tried:
                row = self._try(loaded, measure)
                yield row
                seconds, key = row.get("seconds", math.inf), (measure.kind, measure.tried)
                if seconds < best.get(key, math.inf):
                    best[key], fastest[key] = seconds, loaded
            for other in opened:
                if all(other is not kept for kept in fastest.values()):
                    other.worker.close()
        for measure in measures:
            loaded = fastest.get(("decode" if measure.kind == "bare_decode" else measure.kind, measure.tried))
            if loaded is not None and (measure.kind != "bare_decode" or contestant.engine == OURS):
                self._serving[contestant.label, measure.kind, measure.size] = loaded
                yield loaded.row("chosen", measure=measure.name)

    def _take_turns(self, labels: Sequence[str], measures: Sequence[Measure], rounds: int) -> Iterator[Row]:
        """A row a measurement; an engine that fails is out of that measure."""
        for index in range(rounds):
            first = index % max(1, len(labels))
            for measure, label in itertools.product(measures, [*labels[first:], *labels[:first]]):
                loaded = self._serving.get((label, measure.kind, measure.size))
                if loaded is None:
                    continue
                time.sleep(self._settle_s)
                bandwidth = self._bandwidth()
                try:
                    seconds = loaded.ask(measure, 100 + index, self._steps.get(measure.size, 0))
                except EngineFailed as error:
                    del self._serving[label, measure.kind, measure.size]
                    yield loaded.row("failed", measure=measure.name, why=str(error))
                    continue
                yield loaded.row("time", measure=measure.name, round=index, seconds=seconds, bandwidth=bandwidth)

    def _try(self, loaded: Loaded, measure: Measure) -> Row:
        """One measurement after a shorter one that warms up."""
        try:
            loaded.ask(measure, 1, 4)
            return loaded.row(
                "tried", measure=measure.name, seconds=loaded.ask(measure, 2, self._steps.get(measure.size, 0))
            )
        except EngineFailed as error:
            return loaded.row("failed", measure=measure.name, why=str(error))
