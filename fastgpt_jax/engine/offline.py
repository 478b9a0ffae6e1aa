"""Prompts in, finished continuations out: a loop of steps over an engine that may have other requests too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from fastgpt_jax.engine.outputs import EmbeddingOutput, RequestOutput
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.engine.prompts import Prompt, as_prompts
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams

Params = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]]
"""One set of parameters for all prompts or one a prompt; a mapping stands for its keyword arguments."""


@runtime_checkable
class Engine(Protocol):
    """What is asked of an engine."""

    def check_requests(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | PoolingParams]
    ) -> list[tuple[str | None, list[int]]]: ...
    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams | None = None
    ) -> None: ...
    def abort_request(self, request_id: str | Iterable[str]) -> Any: ...
    def step(self) -> list[RequestOutput | EmbeddingOutput]: ...


class Offline:
    """Runs lists of prompts through an engine; several iterations over one engine may be open at a time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._num_requests = 0
        self._arrived: dict[str, deque[Any]] = {}  # of each request, the queue of its iteration
        self._others: list[Any] = []

    @property
    def has_others(self) -> bool:
        """Whether there are outputs of requests that are none of its own."""
        return bool(self._others)

    def take_others(self) -> list[Any]:
        """Returns the outputs of steps that it ran and that are for others: all ends, and the newest of the rest."""
        others, self._others = self._others, []
        return others

    def generate(
        self, prompts: Any, prompt_token_ids: Any, sampling_params: Params | None, use_tqdm: bool
    ) -> list[RequestOutput]:
        """Continues every prompt; returns the results in the order of the prompts."""
        given = as_prompts(prompts, prompt_token_ids)
        return self._finish(given, _as_params(sampling_params, len(given)), use_tqdm)

    def embed(self, prompts: Any, prompt_token_ids: Any, use_tqdm: bool) -> list[EmbeddingOutput]:
        """Makes a vector of every prompt; returns them in the order of the prompts."""
        given = as_prompts(prompts, prompt_token_ids)
        return self._finish(given, [PoolingParams()] * len(given), use_tqdm)

    def stream(
        self, prompts: Any, prompt_token_ids: Any, sampling_params: Params | None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt; yields the prompt's index and all it has so far, after each of its tokens."""
        given = as_prompts(prompts, prompt_token_ids)
        return self._run(self._check(given, _as_params(sampling_params, len(given))))

    def _finish(self, prompts: Sequence[Prompt], params: Sequence[Any], use_tqdm: bool) -> list[Any]:
        """Returns the last output of every prompt."""
        finished: dict[int, Any] = {}
        requests = self._check(prompts, params)
        with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm) as progress:
            for index, output in self._run(requests):
                if output.finished:
                    if getattr(output, "error", None) is not None:
                        raise RuntimeError(f"prompt {index}: a step failed: {output.error}")
                    finished[index] = output
                    progress.update()
        return [finished[index] for index in range(len(requests))]

    def _check(self, prompts: Sequence[Prompt], params: Sequence[Any]) -> list[tuple[Prompt, Any]]:
        """Returns prompts as ids with their parameters, all of them servable."""
        checked = self._engine.check_requests(prompts, params)
        return [
            ({"prompt": text, "prompt_token_ids": token_ids}, one)
            for (text, token_ids), one in zip(checked, params, strict=True)
        ]

    def _run(self, requests: Sequence[tuple[Prompt, Any]]) -> Iterator[tuple[int, Any]]:
        index_of: dict[str, int] = {}
        arrived: deque[Any] = deque()
        try:
            for index, (prompt, params) in enumerate(requests):
                request_id = f"offline-{self._num_requests}"
                self._num_requests += 1
                self._engine.add_request(request_id, prompt, params)
                self._arrived[request_id] = arrived
                index_of[request_id] = index
            num_left = len(requests)
            while num_left:
                self._step()
                while arrived:
                    output = arrived.popleft()
                    num_left -= output.finished
                    yield index_of[output.request_id], output
        finally:
            self._engine.abort_request(index_of)
            for request_id in index_of:
                del self._arrived[request_id]

    def _step(self) -> None:
        """Runs a step and files its outputs, some of which may be for another iteration over this engine."""
        for output in self._engine.step():
            if output.request_id in self._arrived:
                self._arrived[output.request_id].append(output)
                continue
            name = output.request_id
            self._others = [other for other in self._others if other.finished or other.request_id != name]
            self._others.append(output)


def _as_params(params: Params | None, num_prompts: int) -> list[SamplingParams]:
    """Returns parameters for each prompt."""
    if params is None or isinstance(params, (SamplingParams, Mapping)):
        return [_as_one(params)] * num_prompts
    if not isinstance(params, Sequence):
        raise UserError(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}")
    if len(params) != num_prompts:
        raise UserError(f"sampling_params must be one or one a prompt, got {len(params)} for {num_prompts} prompts")
    return [_as_one(one) for one in params]


def _as_one(params: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
    if isinstance(params, SamplingParams):
        return params
    try:
        return SamplingParams(**(params or {}))
    except TypeError as error:
        raise UserError(f"sampling_params: {error}") from None
