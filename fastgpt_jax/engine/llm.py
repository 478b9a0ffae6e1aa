"""The offline entry: prompts in, finished continuations out, or a stream of them. vLLM's `LLM` in name and meaning."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from fastgpt_jax.engine.args import make_engine_args
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.engine.prompts import Prompt, as_prompts
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams

Params = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]]
"""One set of parameters for all prompts or one a prompt; a mapping stands for its keyword arguments."""


class LLM:
    """A model ready to continue prompts.

    `LLM(model, **engine_args)`: `model` is a folder, a loaded model or a compiled one; see `EngineArgs` for the rest.
    """

    def __init__(self, model: Any, **engine_args: Any):
        self.llm_engine = LLMEngine.from_engine_args(make_engine_args(model, engine_args))
        self._num_requests = 0
        self._arrived: dict[str, deque[RequestOutput]] = {}

    def get_tokenizer(self) -> Any:
        """Returns the model's tokenizer, or None."""
        return self.llm_engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt; returns the results in the order of the prompts.

        All prompts are checked before any is run, so that a mistake in one costs no work on the others.

        Raises:
          UserError: A prompt or its parameters cannot be served; the message says which prompt.
        """
        finished: dict[int, RequestOutput] = {}
        requests = self._check(prompts, prompt_token_ids, sampling_params)
        with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm) as progress:
            for index, output in self._run(requests):
                if output.finished:
                    finished[index] = output
                    progress.update()
        return [finished[index] for index in range(len(requests))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt; yields the prompt's index and all it has so far, after each of its tokens.

        A text only ever grows from one output to the next. Leaving the iteration early aborts what is unfinished.
        """
        return self._run(self._check(prompts, prompt_token_ids, sampling_params))

    def _check(
        self, prompts: Any, prompt_token_ids: Any, sampling_params: Params | None
    ) -> list[tuple[Prompt, SamplingParams]]:
        """Returns prompts as ids with their parameters, all of them servable."""
        given = as_prompts(prompts, prompt_token_ids)
        requests: list[tuple[Prompt, SamplingParams]] = []
        for index, (prompt, params) in enumerate(zip(given, _as_params(sampling_params, len(given)), strict=True)):
            try:
                text, token_ids = self.llm_engine.check_request(prompt, params)
            except UserError as error:
                raise UserError(f"prompt {index}: {error}" if len(given) > 1 else str(error)) from None
            requests.append(({"prompt": text, "prompt_token_ids": token_ids}, params))
        return requests

    def _run(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
        index_of: dict[str, int] = {}
        for index, (prompt, params) in enumerate(requests):
            request_id = f"llm-{self._num_requests}"
            self._num_requests += 1
            self.llm_engine.add_request(request_id, prompt, params)
            self._arrived[request_id] = deque()
            index_of[request_id] = index
        num_left = len(requests)
        try:
            while num_left:
                self._step()
                for request_id, index in index_of.items():
                    arrived = self._arrived[request_id]
                    while arrived:
                        output = arrived.popleft()
                        num_left -= output.finished
                        yield index, output
        finally:
            self.llm_engine.abort_request(index_of)
            for request_id in index_of:
                del self._arrived[request_id]

    def _step(self) -> None:
        """Runs a step and files its outputs, some of which may be for another iteration over this engine."""
        for output in self.llm_engine.step():
            if output.request_id in self._arrived:
                self._arrived[output.request_id].append(output)


def _as_params(params: Params | None, num_prompts: int) -> list[SamplingParams]:
    """Returns parameters for each prompt."""
    if params is None or isinstance(params, (SamplingParams, Mapping)):
        return [_as_one(params)] * num_prompts
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
