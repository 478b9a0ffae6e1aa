"""The thread that owns an engine: commands in, steps, outputs out.

Knows no asyncio and no HTTP. The one idea: the engine is touched by this thread alone; commands are functions that run
between two steps, and whoever gave one is never waited for. The engine has a thread for its steps, and this one makes
text of what they bring.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt_jax.engine.stats import EngineStats

MAX_ESCAPED = 3
"""So many errors that the engine did not handle, one after the other, mean that it is beyond help."""
MAX_FAILED_STEPS = 64
"""So many failed steps, with none between that went well, mean that the device is; one request may fail a few alone."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step: when it began and ended, on the monotonic clock, what came out, and the engine's counts after it."""

    started_s: float
    ended_s: float
    outputs: Sequence[Any]
    stats: EngineStats

    @property
    def seconds(self) -> float:
        return self.ended_s - self.started_s


class EngineThread:
    """Steps an engine whenever it has something to do.

    Invariants: `engine` is used by this thread alone once it runs; callbacks are called on this thread, in order.
    """

    def __init__(
        self,
        engine: Any,
        *,
        on_step: Callable[[StepRecord], None],
        on_failed_step: Callable[[Exception], None],
        on_death: Callable[[BaseException], None],
    ):
        self._engine = engine
        self._on_step = on_step
        self._on_failed_step = on_failed_step
        self._on_death = on_death
        self._commands: deque[Callable[[], None]] = deque()
        self._has_work = threading.Condition()
        self._is_closing = False
        self._num_escaped = 0
        self._num_failed = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats: EngineStats = engine.stats()

    def start(self) -> None:
        """Lets the thread run, and the engine's own."""
        self._engine.start()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, command: Callable[[], None]) -> None:
        """Has a function run on the thread before its next step; what it raises ends the thread."""
        with self._has_work:
            self._commands.append(command)
            self._has_work.notify()
        self._engine.interrupt()

    def close(self) -> None:
        """Ends the thread after the step it is in, and waits for that."""
        with self._has_work:
            self._is_closing = True
            self._has_work.notify()
        self._engine.interrupt()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._run_commands():
                if self._engine.has_unfinished_requests():
                    self._step()
                else:
                    self.stats = self._engine.stats()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._on_death(error)

    def _run_commands(self) -> bool:
        """Runs what was submitted, waiting for something where the engine is idle; False when it is time to end."""
        with self._has_work:
            while not (self._commands or self._is_closing or self._engine.has_unfinished_requests()):
                self._has_work.wait()
            commands = list(self._commands)
            self._commands.clear()
            is_closing = self._is_closing
        for command in commands:
            command()
        return not is_closing

    def _step(self) -> None:
        started_s = time.monotonic()
        try:
            outputs: list[Any] = self._engine.step()
        except Exception as error:
            self._num_escaped += 1
            if self._num_escaped >= MAX_ESCAPED:
                raise
            self._on_failed_step(error)
            return
        self._num_escaped = 0
        before, self.stats = self.stats, self._engine.stats()
        self._watch(before, self.stats)
        self._on_step(StepRecord(started_s, time.monotonic(), outputs, self.stats))

    def _watch(self, before: EngineStats, after: EngineStats) -> None:
        """Counts failed steps that the engine came through, until tokens come again."""
        if after.generation_tokens > before.generation_tokens:
            self._num_failed = 0
        self._num_failed += after.num_failed_steps - before.num_failed_steps
        if self._num_failed >= MAX_FAILED_STEPS:
            raise RuntimeError(f"{self._num_failed} steps failed one after the other")
