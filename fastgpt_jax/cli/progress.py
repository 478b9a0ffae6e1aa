"""How far a build is, on standard error: a bar at a terminal, a line an entry point elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

import tqdm

from fastgpt_jax.cli.tables import format_bytes, format_seconds
from fastgpt_jax.compiler.build import Event


class BuildProgress:
    """Shows the events of a build.

    Attributes:
      num_done: Entry points that are finished.
    """

    def __init__(self, *, is_terminal: bool | None = None):
        """Args: is_terminal: Whether standard error is a terminal; None asks it."""
        self.num_done = 0
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._bar: tqdm.tqdm | None = None
        self._kind = ""

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if event.kind == "entry_point":
            self.num_done = event.done
        if self._is_terminal:
            self._advance(event)
        elif event.kind == "entry_point":
            took = "compiled before" if event.is_reused else format_seconds(event.seconds)
            _say(f"[{event.done}/{event.total}] {event.name}: {took}")
        elif event.done == event.total:
            _say(f"weights: {format_bytes(event.total)}")

    def _advance(self, event: Event) -> None:
        if self._bar is None or self._kind != event.kind:
            self._close()
            self._kind = event.kind
            is_bytes = event.kind == "weights"
            unit = "B" if is_bytes else " entry points"
            self._bar = tqdm.tqdm(
                total=event.total, file=sys.stderr, dynamic_ncols=True, unit=unit, unit_scale=is_bytes
            )
        self._bar.set_description(event.name, refresh=False)
        self._bar.update(event.done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
