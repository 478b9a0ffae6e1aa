"""The engine: prompts in, steps of the compiled model, outputs out. vLLM's `LLMEngine` in name and meaning.

The one idea: a core that knows ids alone (`core.py`) and what makes text of them (`output_processor.py`), put together
so that the device has its next step before anybody looks at the text of the last: on one thread by turns, or, after
`start`, each on its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fastgpt_jax.engine.args import EngineArgs
from fastgpt_jax.engine.compiled import CompiledModel, end_ids
from fastgpt_jax.engine.core import EngineCore
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.loading import resolve_model
from fastgpt_jax.engine.offline import Offline, Params
from fastgpt_jax.engine.output_processor import Output, OutputProcessor
from fastgpt_jax.engine.outputs import EmbeddingOutput, RequestOutput
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.engine.prompts import Prompt, check_params, check_prompt, encode_prompt
from fastgpt_jax.engine.request import RequestGroup, make_requests
from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.engine.step_thread import StepThread
from fastgpt_jax.engine.updates import Update
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.structured import DEADLINE_S, StructuredCompiler, StructuredOutput

MAX_NAP_S = 0.001
"""Longest that a step sleeps where it waits for more requests to begin with."""


class LLMEngine:
    """Runs requests of different lengths together.

    Invariants: an id names at most one unfinished request; the same requests in the same order give the same outputs,
    whatever else runs; after `start` the core is used by its thread alone, and all the rest by one other.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        *,
        seed: int = 0,
        options: CoreOptions = CoreOptions(),
        num_workers: int = 0,
        grammar_timeout_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Makes an engine of a compiled model.

        Args:
          seed: Decides the draws of requests that bring no seed, by their order of arrival.
          num_workers: Threads that turn text into ids where there are many prompts; 0 uses the caller's.
          grammar_timeout_s: Longest that the form of a text may compile.
          clock: Seconds that only grow.
        """
        if compiled.buckets.chunk_lens[-1] < compiled.min_first_chunk:
            raise RuntimeError(
                f"no prefill bucket of {compiled.buckets.chunk_lens} holds the first {compiled.min_first_chunk} tokens "
                "that the model needs at once"
            )
        self.compiled = compiled
        self.core = EngineCore(compiled, options, clock)
        self._clock = clock
        self._seed = seed
        self._num_added = self._num_seeds = 0
        self._processor = OutputProcessor(self.tokenizer, self.core.stop, clock)
        self._offline = Offline(self)
        self.forms = StructuredCompiler(
            self.tokenizer, compiled.vocab_size, end_ids(compiled), deadline_s=grammar_timeout_s
        )
        self._workers = ThreadPoolExecutor(num_workers, "tokeniser") if num_workers else None
        self._steps: StepThread | None = None
        self._stats = self.core.stats()

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, grammar_timeout_s: float = DEADLINE_S) -> LLMEngine:
        """Compiles what `args.model` names, if it is not compiled already."""
        return cls(
            resolve_model(args),
            seed=args.seed,
            options=args.core_options,
            num_workers=args.num_workers,
            grammar_timeout_s=grammar_timeout_s,
        )

    @property
    def tokenizer(self) -> Any:
        return self.compiled.tokenizer

    @property
    def num_full_sorts(self) -> int:
        """Times that a row needed the sampler's exact fallback over the whole vocabulary."""
        return self.core.num_full_sorts

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do, or to tell."""
        return bool(self._processor.num_unfinished or self._offline.has_others)

    def get_num_unfinished_requests(self) -> int:
        """Returns how many ids are waiting or running."""
        return self._processor.num_unfinished

    def start(self) -> None:
        """Runs steps on a thread of their own from now on: `step` waits for one and makes text meanwhile."""
        if self._steps is None:
            self._steps = StepThread(self.core)

    def close(self) -> None:
        """Ends the thread of the steps, if there is one; nothing can be asked of the engine afterwards."""
        if self._steps is not None:
            self._steps.close()

    def interrupt(self) -> None:
        """Has `step` return where it waits for the thread of the steps; any thread may call it."""
        if self._steps is not None:
            self._steps.interrupt()

    def stats(self) -> EngineStats:
        """Returns counts and gauges as they are now, or, where steps run on their own, as the last one left them."""
        if self._steps is None:
            return self.core.stats()
        if not self.has_unfinished_requests():
            self._stats = self._steps.ask(self.core.stats)
        return self._stats

    def check_request(
        self, prompt: Prompt, params: SamplingParams | PoolingParams, *, compiles: bool = True
    ) -> tuple[str | None, list[int]]:
        """Returns a prompt's text and ids; raises UserError where the request could not be run. Any thread may ask.

        Args:
          compiles: Whether the form that the text must have, if any, is compiled as well, which may take long.
        """
        check_params(params, self.compiled)
        text, token_ids = encode_prompt(prompt, self.tokenizer)
        check_prompt(token_ids, self.compiled)
        form = getattr(params, "structured_outputs", None)
        if form is not None and compiles:
            self.forms.compile(form)
        return text, token_ids

    def check_requests(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | PoolingParams]
    ) -> list[tuple[str | None, list[int]]]:
        """The same for many prompts, by as many threads as there are workers."""

        def check(index: int) -> tuple[str | None, list[int]]:
            try:
                return self.check_request(prompts[index], params[index])
            except UserError as error:
                raise UserError(f"prompt {index}: {error}" if len(prompts) > 1 else str(error)) from None

        if self._workers is None or len(prompts) < 2:
            return [check(index) for index in range(len(prompts))]
        return list(self._workers.map(check, range(len(prompts))))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
    ) -> None:
        """Queues a prompt; a request that cannot be run raises UserError and leaves the others as they are.

        Args:
          params: How to continue it; `PoolingParams` for its embedding.
          priority: Lower values run first, and take the place of higher ones where there is none.
          deadline_s: Seconds from now after which it ends with what it has, by finish reason "deadline".
          cache_salt: Requests of different salts share no cached prefix.
        """
        params = SamplingParams() if params is None else params
        if request_id in self._processor:
            raise UserError(f"request id {request_id!r} is in use by an unfinished request")
        if deadline_s is not None and not deadline_s >= 0:
            raise UserError(f"deadline_s must be at least 0, got {deadline_s!r}")
        text, token_ids = self.check_request(prompt, params)
        now = self._clock()
        deadline = None if deadline_s is None else now + deadline_s
        group = RequestGroup(
            request_id, text, token_ids, params, arrival=now, deadline=deadline, eos_ids=end_ids(self.compiled)
        )
        self._num_added += 1
        make_requests(
            group,
            number=self._num_added,
            priority=priority,
            seed=self._seed_of(params),
            salts=(cache_salt,),
            page_size=self.compiled.layout.page_size,
            make_structured=lambda: self._start_form(params),
        )
        self._processor.add(group)
        self._tell_core(lambda: self.core.add(group))

    def abort_request(self, request_id: str | Iterable[str]) -> list[Output]:
        """Ends requests and frees their pages at once; returns what they had. Ids that do not run are ignored."""
        outputs = []
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            requests = self._processor.requests(name)
            self._tell_core(lambda requests=requests: self.core.abort(requests))
            output = self._processor.abort(name)
            if output is not None:
                outputs.append(output)
        return outputs

    def step(self) -> list[Output]:
        """Has the device run a step; returns the requests that got a token or an end, with all they have so far.

        What came for requests of `add_request` while `generate` or its like had the engine run comes first.
        """
        others = self._offline.take_others()
        if self._steps is not None:
            return [*others, *self._take(self._steps)]
        wait_s = self.core.seconds_until_due()
        if wait_s > 0 and not others:
            time.sleep(min(wait_s, MAX_NAP_S))
        outputs = self.process(self.core.step())
        self.core.end_stopped()
        return [*others, *outputs]

    def _take(self, steps: StepThread) -> list[Output]:
        """Returns what comes of the next step of the other thread."""
        told = steps.take()
        if told is None:
            return []
        self._stats = told.stats
        if told.error is not None:
            raise told.error
        return self.process(told.updates)

    def _tell_core(self, command: Callable[[], object]) -> None:
        """Has the core do something before its next step."""
        if self._steps is None:
            command()
        else:
            self._steps.submit(command)

    def process(self, updates: Iterable[Update]) -> list[Output]:
        """Makes outputs of what `core.step` returned, in that order."""
        return self._processor.process(updates)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt; as `LLM.generate`, for callers that hold an engine."""
        return self._offline.generate(prompts, prompt_token_ids, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = False,
    ) -> list[EmbeddingOutput]:
        """Makes a vector of every prompt; as `LLM.embed`, for callers that hold an engine."""
        return self._offline.embed(prompts, prompt_token_ids, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt; as `LLM.stream`, for callers that hold an engine."""
        return self._offline.stream(prompts, prompt_token_ids, sampling_params)

    def _start_form(self, params: SamplingParams | PoolingParams) -> StructuredOutput | None:
        """Returns the beginning of the form that a text must have, if it must have any."""
        form = getattr(params, "structured_outputs", None)
        return None if form is None else StructuredOutput(form, self.forms)

    def _seed_of(self, params: SamplingParams | PoolingParams) -> int:
        """Returns a request's seed, or one that the engine's and the number of requests before this one decide."""
        if isinstance(params, PoolingParams):
            return 0
        if params.seed is not None:
            return params.seed
        self._num_seeds += 1
        return int(np.random.SeedSequence([self._seed, self._num_seeds]).generate_state(1, np.uint32)[0])

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant of the engine does not hold."""
        if self._steps is not None:
            return self._steps.ask(self.core.check_integrity)
        self.core.check_integrity()
        scheduler = self.core.scheduler
        held = {id(request) for request in (*scheduler.waiting, *scheduler.running)}
        if held != self._processor.unfinished():
            raise RuntimeError("the scheduler's requests are not those whose outputs are awaited")
