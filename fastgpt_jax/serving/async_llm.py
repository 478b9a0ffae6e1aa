"""An engine for asyncio: many requests await their outputs while one thread steps.

Knows no HTTP. The one idea: an output holds all that its request has so far, so a mailbox of one output a request is
enough. The engine's thread overwrites it and never waits; a slow reader misses outputs in between and no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastgpt_jax.engine.outputs import EmbeddingOutput, RequestOutput
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.admission import Admission
from fastgpt_jax.serving.async_llm_mail import Observer, Stream, aborted, dead, failure, mean_length
from fastgpt_jax.serving.engine_thread import EngineThread, StepRecord
from fastgpt_jax.serving.forms import Forms
from fastgpt_jax.serving.unavailable import Aborted, Draining, EngineDead, Overloaded, StepFailed

__all__ = ["Aborted", "AsyncLLM", "Draining", "EngineDead", "Overloaded", "StepFailed"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
NUM_TOKENISERS = 2
POLL_S = 0.02
"""How often a drain looks whether all is done."""


class AsyncLLM:
    """Runs an engine on a thread of its own; called from one event loop at a time.

    Invariants: `_streams` and `_admission` are touched on the event loop alone, the engine on its thread alone; what
    goes from the thread to the loop lies in `_mail` under `_lock`; a request is in `_streams` from its admission until
    it has finished, failed or been left.
    """

    def __init__(
        self,
        engine: Any,
        *,
        max_queue_len: int,
        max_queued_tokens: int,
        model_name: str = "model",
        num_tokenisers: int = NUM_TOKENISERS,
    ):
        """Takes over an engine.

        Args:
          engine: An `LLMEngine`, which nobody else may use from now on.
          num_tokenisers: Threads that check requests and make tokens of text.
        """
        self.model_name = model_name
        self._engine = engine
        self._admission = Admission(
            max_running=engine.compiled.max_num_seqs, max_queue_len=max_queue_len, max_queued_tokens=max_queued_tokens
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}
        self._observers: list[Observer] = []
        self._lock = threading.Lock()
        self._mail: dict[str, Any] = {}
        self._work = [0, 0.0]  # tokens and seconds since the mail was last fetched
        self._num_tokens: dict[str, int] = {}  # of the thread
        self.num_refused: Counter[str] = Counter({"overloaded": 0, "draining": 0})
        self._is_draining = False
        self._death: BaseException | None = None
        self._tokenisers = ThreadPoolExecutor(num_tokenisers, thread_name_prefix="tokeniser")
        self._forms = Forms(engine)
        self._thread = EngineThread(
            engine, on_step=self._on_step, on_failed_step=self._on_failed_step, on_death=self._on_death
        )
        self._thread.start()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self._engine.tokenizer

    @property
    def compiled(self) -> Any:
        """The compiled model, for its facts."""
        return self._engine.compiled

    @property
    def generation(self) -> Any:
        """Facts of the checkpoint (`GenerationDefaults`), or None."""
        return self._engine.compiled.generation

    @property
    def max_model_len(self) -> int:
        return self._engine.compiled.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self._engine.compiled.max_num_seqs

    @property
    def max_logprobs(self) -> int:
        return self._engine.compiled.max_logprobs

    @property
    def vocab_size(self) -> int:
        return self._engine.compiled.vocab_size

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs; once false, it stays so."""
        return self._death is None and self._thread.is_alive

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.is_alive and not self._is_draining

    @property
    def num_unfinished(self) -> int:
        """Requests that were let in and have not ended."""
        return len(self._streams)

    @property
    def queue_s(self) -> float:
        """Seconds that a request let in now is expected to wait, by the measured rate; 0 where nothing is known."""
        return self._admission.queue_s

    def stats(self) -> EngineStats:
        """Returns the engine's counts after its last step."""
        return self._thread.stats

    def observe(self, observer: Observer) -> None:
        """Has an observer told of what happens, on the engine's thread; it must be quick, and must not raise."""
        self._observers.append(observer)

    async def generate(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        room: object | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Continues a prompt; yields all it has so far, whenever there is more, until the output is finished.

        Leaving the iteration aborts the request (close the iterator where it may live on: `contextlib.aclosing`).

        Args:
          deadline_s: Seconds from now, after which it ends with what it has and the finish reason "deadline".
          cache_salt: Requests of different salts share no cached prefix.
          room: What `room` yielded for this request and others.

        Raises:
          UserError: The request cannot be served.
          Overloaded: Too much waits already.
          Draining, EngineDead: Nothing is taken any more.
          StepFailed: A step failed that the request had a part in.
        """
        options = {"priority": priority, "deadline_s": deadline_s, "cache_salt": cache_salt}
        async with contextlib.aclosing(self._run(request_id, prompt, params, options, room)) as outputs:
            async for output in outputs:
                yield output

    async def embed(self, request_id: str, prompts: Sequence[Any], *, cache_salt: str = "") -> list[EmbeddingOutput]:
        """Makes a vector of every prompt; all are given up when one cannot be served, or nobody awaits them.

        Args:
          cache_salt: Prompts of different salts share no cached prefix.

        Raises: As `generate`.
        """

        async def run(index: int, prompt: Any, room: object) -> EmbeddingOutput:
            options = {"cache_salt": cache_salt}
            running = self._run(f"{request_id}-{index}", prompt, PoolingParams(), options, room)
            async with contextlib.aclosing(running) as outputs:
                return await anext(outputs)

        self._check_available()
        self._check_room(len(prompts), 0)
        given = [await self._with_ids(prompt) for prompt in prompts]
        with self.room(len(given), sum(len(prompt["prompt_token_ids"]) for prompt in given)) as room:
            tasks = [asyncio.ensure_future(run(index, prompt, room)) for index, prompt in enumerate(given)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.contextmanager
    def room(self, num_sequences: int, num_tokens: int) -> Iterator[object]:
        """Lets several prompts in together, or none of them: no prompt is refused for the sake of its siblings.

        Yields what `generate` takes for each of them. Raises: Overloaded, Draining, EngineDead.
        """
        self._check_available()
        self._bind()
        with self._counting_refusals():
            room = self._admission.reserve(num_sequences, num_tokens)
        try:
            yield room
        finally:
            self._admission.remove(room)

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Does what takes a while on one of the threads that make tokens of text; others are answered meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenisers, work)

    async def _with_ids(self, prompt: Any) -> Mapping[str, Any]:
        """A prompt whose length is known."""
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return prompt
        return await self._check(prompt, PoolingParams())

    async def _check(self, prompt: Any, params: Any) -> dict[str, Any]:
        """Checks a request off the loop; returns its prompt's text and ids."""
        text, token_ids = await self.aside(
            functools.partial(self._engine.check_request, prompt, params, compiles=False)
        )
        form = getattr(params, "structured_outputs", None)
        if form is not None:
            with self._counting_refusals():
                await self._forms.compile(form)
        return {"prompt": text, "prompt_token_ids": token_ids}

    async def _run(
        self, request_id: str, prompt: Any, params: Any, options: dict[str, Any], room: object | None
    ) -> AsyncGenerator[Any, None]:
        """Checks a request off the loop, queues it, and yields its outputs."""
        self._check_available()
        if room is None:
            self._check_room(getattr(params, "n", 1), 0)
        started_s = time.monotonic()
        checked = await self._check(prompt, params)
        if options.get("deadline_s") is not None:
            options["deadline_s"] = max(options["deadline_s"] - (time.monotonic() - started_s), 0.0)
        stream = self._admit(request_id, checked, params, options, room)
        try:
            while True:
                await stream.has_mail.wait()
                stream.has_mail.clear()
                if stream.error is not None:
                    raise stream.error
                output = stream.output  # may be replaced while the reader is away
                yield output
                if output.finished:
                    return
        finally:
            self._abort(request_id, stream)

    async def abort(self, request_id: str) -> None:
        """Ends a request; who awaits it gets what there is, with the finish reason "abort". Other ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._abort(request_id, stream)
            stream.put(aborted(stream.output))

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what is under way; returns whether all of it ended in time."""
        self._is_draining = True
        deadline_s = time.monotonic() + timeout_s
        while self._streams and self.is_alive and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
        return not self._streams

    async def close(self) -> None:
        """Aborts what is left and ends the thread; a step that runs is waited for."""
        self._is_draining = True
        for request_id, stream in list(self._streams.items()):
            self._abort(request_id, stream)
            stream.put(Draining("the server is shutting down"))
        await asyncio.to_thread(self._thread.close)
        await asyncio.to_thread(self._engine.close)
        self._tokenisers.shutdown(wait=False, cancel_futures=True)
        self._forms.close()

    def _check_available(self) -> None:
        if self._is_draining:
            self.num_refused["draining"] += 1
            raise Draining("the server is shutting down; send the request elsewhere")
        if not self.is_alive:
            raise dead()

    def _check_room(self, num_sequences: int, num_tokens: int) -> None:
        with self._counting_refusals():
            self._admission.check(num_sequences, num_tokens)

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except Overloaded:
            self.num_refused["overloaded"] += 1
            raise

    def _admit(
        self, request_id: str, prompt: dict[str, Any], params: Any, options: dict[str, Any], room: object | None
    ) -> Stream:
        """Queues a checked request unless there is too much already and no room was made for it."""
        self._check_available()
        self._bind()
        if request_id in self._streams:
            raise UserError(f"request id {request_id!r} is in use by an unfinished request")
        num_sequences, num_tokens = getattr(params, "n", 1), len(prompt["prompt_token_ids"])
        if room is None:
            self._check_room(num_sequences, num_tokens)
        longest = self.max_model_len - num_tokens
        max_tokens = min(getattr(params, "max_tokens", 0) or longest, longest)
        self._admission.add(request_id, num_sequences, num_tokens, max_tokens, room)
        stream = self._streams[request_id] = Stream()
        self._thread.submit(functools.partial(self._add, request_id, prompt, params, options))
        if self._death is not None:  # while this was queued, and perhaps after those who wait were told
            stream.put(dead())
        return stream

    def _deliver(self) -> None:
        """Puts what lies in the mail into the streams; runs on the event loop."""
        with self._lock:
            mail, self._mail = self._mail, {}
            (num_tokens, seconds), self._work = self._work, [0, 0.0]
        self._admission.rate.add(num_tokens, seconds)
        for request_id, item in mail.items():
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # aborted meanwhile
            self._admission.start(request_id)
            item = failure(item) or item
            if isinstance(item, Exception) or item.finished:
                del self._streams[request_id]
                self._admission.remove(request_id, mean_length(item))
            stream.put(item)

    def _bind(self) -> None:
        """Remembers the loop that outputs go to; another one may take over while nothing is under way."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._streams and self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("one AsyncLLM serves one event loop at a time")
            for request_id, stream in list(self._streams.items()):
                self._abort(request_id, stream)
            with self._lock:
                self._mail = {}  # what the loop before has not fetched is for nobody, and would pass for mail announced
                self._loop = loop

    def _abort(self, request_id: str, stream: Stream) -> None:
        """Forgets a request, and has the engine forget it where it has not finished."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._admission.remove(request_id)
            self._thread.submit(functools.partial(self._forget, request_id))

    # What follows runs on the engine's thread.

    def _add(self, request_id: str, prompt: dict[str, Any], params: Any, options: dict[str, Any]) -> None:
        try:
            self._engine.add_request(request_id, prompt, params, **options)
        except UserError as error:
            self._send({request_id: error})
            return
        self._num_tokens[request_id] = -len(prompt["prompt_token_ids"])

    def _forget(self, request_id: str, reason: str = "abort") -> None:
        if self._num_tokens.pop(request_id, None) is not None:
            self._engine.abort_request(request_id)
            for observer in self._observers:
                observer.on_end(request_id, reason)

    def _on_step(self, record: StepRecord) -> None:
        for observer in self._observers:
            observer.on_step(record)
        num_tokens = sum(map(self._count, record.outputs))
        self._send({output.request_id: output for output in record.outputs}, num_tokens, record.seconds)

    def _count(self, output: Any) -> int:
        """Returns the tokens of an output that no output before it held, the prompt's with the first."""
        before = self._num_tokens.get(output.request_id, 0)
        num_tokens = sum(len(completion.token_ids) for completion in getattr(output, "outputs", ()))
        if output.finished:
            self._num_tokens.pop(output.request_id, None)
        else:
            self._num_tokens[output.request_id] = num_tokens
        return num_tokens - before

    def _on_failed_step(self, error: Exception) -> None:
        """The engine's state is unknown for every request in it, so all of them fail; later ones start afresh."""
        _log.error("a step failed", exc_info=error)
        failed = list(self._num_tokens)
        for request_id in failed:
            self._forget(request_id, "error")
        self._send(
            {request_id: StepFailed(f"a step of the model failed: {type(error).__name__}") for request_id in failed}
        )

    def _on_death(self, error: BaseException) -> None:
        self._death = error
        _log.critical("the engine has stopped", exc_info=error)
        self._send(dict.fromkeys(list(self._streams), dead()))

    def _send(self, mail: dict[str, Any], num_tokens: int = 0, seconds: float = 0.0) -> None:
        """Leaves mail for the loop, in place of what it has not fetched, and calls it unless that was done."""
        with self._lock:
            is_called = bool(self._mail)
            self._mail.update(mail)
            self._work[0] += num_tokens
            self._work[1] += seconds
        if mail and not is_called and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)
