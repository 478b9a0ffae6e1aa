"""What passes between an engine's thread and those who await a request: mail, and what it means.

Knows no engine. The one idea: mail is an output that holds all before it, or the error that is to be raised.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any, Protocol, runtime_checkable

from fastgpt_jax.engine.outputs import EmbeddingOutput
from fastgpt_jax.serving.engine_thread import StepRecord
from fastgpt_jax.serving.unavailable import Aborted, EngineDead, StepFailed

_log = logging.getLogger(__name__)


@runtime_checkable
class Observer(Protocol):
    """Counts what happens; a request ends with a finished output of a step, or by `on_end` ("abort", "error")."""

    def on_step(self, record: StepRecord) -> None: ...
    def on_end(self, request_id: str, reason: str) -> None: ...


class Stream:
    """One request's mailbox, read on the event loop."""

    def __init__(self):
        self.has_mail = asyncio.Event()
        self.output: Any = None
        self.error: Exception | None = None

    def put(self, mail: Any) -> None:
        """Leaves an output, in place of the one before, or an error."""
        if isinstance(mail, Exception):
            self.error = mail
        else:
            self.output = mail
        self.has_mail.set()


def dead() -> EngineDead:
    """Returns what everybody is told when the engine has stopped."""
    return EngineDead("the engine has stopped; the server must be started again")


def aborted(output: Any) -> Any:
    """Returns an output as an abort leaves it, or why there is none."""
    if output is None:
        return Aborted("the request was aborted")
    outputs = tuple(
        dataclasses.replace(completion, finish_reason=completion.finish_reason or "abort")
        for completion in output.outputs
    )
    return dataclasses.replace(output, outputs=outputs, finished=True)


def failure(item: Any) -> Exception | None:
    """Returns what to raise for an output that a failed step ended; what went wrong is for the log."""
    if isinstance(item, Exception) or not item.finished or isinstance(item, EmbeddingOutput):
        return None
    if item.error is None and all(completion.finish_reason != "error" for completion in item.outputs):
        return None
    _log.error("a request failed", extra={"engine_request_id": item.request_id, "error": item.error})
    return StepFailed("a step of the model failed; the server goes on, try again")


def mean_length(item: Any) -> int | None:
    """Returns the tokens that each sequence of a finished output was given; None where there are none."""
    completions = getattr(item, "outputs", ())
    return sum(len(completion.token_ids) for completion in completions) // len(completions) if completions else None
