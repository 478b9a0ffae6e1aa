"""Runs what a request asks for: several prompts at once, until they end or nobody listens any more.

Knows no body of a request. The one idea: whoever asks watches the connection while the engine works; when the client
goes, the work is cancelled where it waits, and cancelling is what aborts it and frees its pages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.serving.errors import ApiError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One prompt of a request, with what the engine is told of it."""

    request_id: str
    text: str | None
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""

    def start(self, llm: Any, room: object | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Hands it to the engine, in the room that was made for it and its siblings."""
        prompt = {"prompt": self.text, "prompt_token_ids": self.token_ids}
        return llm.generate(
            self.request_id,
            prompt,
            self.params,
            priority=self.priority,
            deadline_s=self.deadline_s,
            cache_salt=self.cache_salt,
            room=room,
        )


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits work whose request has been read whole; cancels it and raises ClientGone when the client goes."""
    working = asyncio.ensure_future(work)
    tasks: list[asyncio.Future[Any]] = [working]
    try:
        await asyncio.sleep(0)  # an answer that is known already needs nobody to watch
        if not working.done():
            tasks.append(asyncio.ensure_future(_wait_until_gone(receive)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _cancel([task for task in tasks if not task.done()])


async def _wait_until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stream(llm: Any, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Runs jobs together; yields a job's index and all it has so far, whenever there is more.

    A reader that is slow misses outputs in between, and no token, since each output holds all before it.
    """
    if len(jobs) == 1:
        async with contextlib.aclosing(jobs[0].start(llm)) as outputs:
            async for output in outputs:
                yield 0, _check(output)
        return
    num_sequences, num_tokens = sum(job.params.n for job in jobs), sum(len(job.token_ids) for job in jobs)
    with llm.room(num_sequences, num_tokens) as room:
        async with contextlib.aclosing(_stream_all(llm, jobs, room)) as outputs:
            async for output in outputs:
                yield output


async def _stream_all(llm: Any, jobs: Sequence[Job], room: object) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    latest: dict[int, RequestOutput] = {}
    news = asyncio.Event()

    async def follow(index: int, job: Job) -> None:
        async with contextlib.aclosing(job.start(llm, room)) as outputs:
            async for output in outputs:
                latest[index] = output
                news.set()

    tasks = [asyncio.ensure_future(follow(index, job)) for index, job in enumerate(jobs)]
    for task in tasks:
        task.add_done_callback(lambda _: news.set())
    try:
        is_done = False
        while not is_done:
            await news.wait()
            news.clear()
            is_done = all(task.done() for task in tasks)
            arrived, latest = latest, {}
            for index, output in arrived.items():
                yield index, _check(output)
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await _cancel(tasks)


async def collect(llm: Any, jobs: Sequence[Job]) -> list[RequestOutput]:
    """Runs jobs together to their ends; returns their last outputs in order."""
    finished: dict[int, RequestOutput] = {}
    async with contextlib.aclosing(stream(llm, jobs)) as outputs:
        async for index, output in outputs:
            if output.finished:
                finished[index] = output
    return [finished[index] for index in range(len(jobs))]


def _check(output: RequestOutput) -> RequestOutput:
    """Raises ApiError for what the engine ended before its time."""
    reasons = {continuation.finish_reason for continuation in output.outputs}
    if "deadline" in reasons:
        raise deadline_exceeded()
    if "abort" in reasons:
        raise ApiError("draining", "the request was ended before it was done")
    return output


def deadline_exceeded() -> ApiError:
    """The answer to a request that took longer than its deadline or the server's."""
    return ApiError("deadline_exceeded", "the request took longer than it may; ask for less, or later")


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)
