"""The job itself: a window of requests under way, answers written as they come.

Knows no model: requests go to a `call`, which is a server's routes in this process or anything else that answers.
The one idea: at most so many requests are read ahead as may run and wait together, so that memory does not grow with
the input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastgpt_jax.batch.journal import Journal
from fastgpt_jax.batch.requests import BadLine, BatchRequest


@dataclasses.dataclass(frozen=True)
class Response:
    """What a request was answered with.

    Attributes:
      status: HTTP's.
      request_id: The server's.
      body: A JSON value.
    """

    status: int
    request_id: str
    body: Any


Call = Callable[[BatchRequest], Awaitable[Response]]


@dataclasses.dataclass
class Tally:
    """What a run has done.

    Attributes:
      statuses: Answers by status; lines that were no requests are 0.
    """

    started_s: float
    statuses: Counter[int] = dataclasses.field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def num_answered(self) -> int:
        return self.statuses.total()

    @property
    def num_failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != 200)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def counts(self) -> dict[str, int]:
        """What a progress bar shows beside the number of answers."""
        return {"tokens": self.generated_tokens, "failed": self.num_failed}

    def add(self, response: Response | None) -> None:
        """Counts an answer; None is a line that was no request."""
        self.statuses[0 if response is None else response.status] += 1
        usage = response.body.get("usage") if response is not None and isinstance(response.body, dict) else None
        if isinstance(usage, dict):
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.generated_tokens += usage.get("completion_tokens") or 0


async def run_job(
    requests: Iterable[BatchRequest | BadLine],
    journal: Journal,
    call: Call,
    *,
    window: int,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answers every request that has no answer yet.

    Args:
      window: Most requests under way.
      should_stop: Asked before each request is taken; once true, what is under way is finished and the run ends.
      report: Called after every answer.
    """
    tally = Tally(time.monotonic())
    left = (request for request in requests if not journal.is_done(request.number))
    taken = itertools.takewhile(lambda request: not should_stop(), left)

    async def work() -> None:
        for request in taken:  # shared by all workers: each takes the next one
            answer, response = await _answer(request, call)
            journal.write(request.number, answer)
            tally.add(response)
            report(tally)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(window):
                group.create_task(work())
    except ExceptionGroup as group:  # the first failure is what cancelled the others
        raise group.exceptions[0] from None
    return tally


async def _answer(request: BatchRequest | BadLine, call: Call) -> tuple[dict[str, Any], Response | None]:
    """A request's line in OpenAI's form, without its id."""
    if isinstance(request, BadLine):
        await asyncio.sleep(0)  # a file of nothing but bad lines lets signals through
        error = {"code": "invalid_request", "message": f"line {request.number}: {request.reason}"}
        return {"custom_id": request.custom_id, "response": None, "error": error}, None
    response = await call(request)
    found = {"status_code": response.status, "request_id": response.request_id, "body": response.body}
    error = None
    if response.status != 200:
        told = response.body.get("error") if isinstance(response.body, dict) else None
        told = told if isinstance(told, dict) else {}
        error = {"code": told.get("code"), "message": told.get("message") or f"status {response.status}"}
    return {"custom_id": request.custom_id, "response": found, "error": error}, response
