"""A thread of its own for the loop that knows ids alone, so that no text is made between two steps.

Knows no text. The one idea: the core is touched by this thread alone. What others want of it are commands that run
between two steps; what it has to say lies in a queue, a step an entry, and it waits where nobody takes them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt_jax.engine.core import EngineCore
from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.engine.updates import Update

MAX_BEHIND = 4
"""Steps whose news nobody has taken; with more the device waits, lest a text that ended be continued for long."""


@dataclasses.dataclass(frozen=True)
class Told:
    """News of a step.

    Attributes:
      error: What it raised, where it did: it has no news then, and all requests have ended.
    """

    updates: Sequence[Update]
    stats: EngineStats
    error: Exception | None = None


class StepThread:
    """Steps a core whenever it has something to do."""

    def __init__(self, core: EngineCore):
        self._core = core
        self._commands: deque[Callable[[], object]] = deque()
        self._told: deque[Told] = deque()
        self._changed = threading.Condition()
        self._is_interrupted = self._is_closing = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(self, command: Callable[[], object]) -> None:
        """Has a function run on the thread before its next step; what it raises ends the thread."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def ask(self, question: Callable[[], Any]) -> Any:
        """Returns what a function of the core returns, once the commands before it have run."""
        done, answers = threading.Event(), []

        def answer() -> None:
            try:
                answers.append((question(), None))
            except Exception as error:
                answers.append((None, error))
            finally:
                done.set()

        self.submit(answer)
        while not done.wait(0.1):
            self._check_alive()
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    def take(self) -> Told | None:
        """Waits for the news of the next step; None where `interrupt` was called."""
        with self._changed:
            while not (self._told or self._is_interrupted or self._death):
                self._changed.wait()
            self._is_interrupted = False
            if self._told:
                self._changed.notify_all()
                return self._told.popleft()
        self._check_alive()
        return None

    def interrupt(self) -> None:
        """Has who waits in `take` return; any thread may call it."""
        with self._changed:
            self._is_interrupted = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread after the step it is in, and waits for that."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise RuntimeError(f"the thread of the engine's steps has stopped: {self._death!r}") from self._death
        if not self._thread.is_alive():
            raise RuntimeError("the thread of the engine's steps was closed")

    def _run(self) -> None:
        try:
            while self._wait():
                self._tell()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            with self._changed:
                self._death = error
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Runs commands, and waits until a step is due; False when it is time to end."""
        while True:
            with self._changed:
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            with self._changed:
                if self._is_closing:
                    return False
                if self._commands:
                    continue
                due_s = self._core.seconds_until_due() if self._core.has_work else None
                if due_s == 0 and len(self._told) < MAX_BEHIND:
                    return True
                self._changed.wait(due_s or None)

    def _tell(self) -> None:
        """Runs a step, and leaves what it brought."""
        try:
            updates, error = self._core.step(), None
        except Exception as raised:
            self._core.abort_all()  # what state they are in is unknown
            updates, error = [], raised
        told = Told(updates, self._core.stats(), error)
        with self._changed:
            self._told.append(told)
            self._changed.notify_all()
