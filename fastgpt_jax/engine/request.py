"""One continuation of one prompt on its way through the engine, and the group of continuations a user asked for.

Knows no device and no scheduling. The one idea: a request is its tokens and a count of how many the cache holds;
where it stands (waiting, prefill, decode, finished) follows from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgpt_jax.engine.outputs import CompletionOutput, Logprob, RequestOutput
from fastgpt_jax.engine.text import OutputText
from fastgpt_jax.sampling.params import SamplingParams


class Request:
    """One continuation.

    Invariants: `num_cached <= len(prompt) + len(output)`; it decodes when exactly its newest token is not cached; it
    holds a slot from admission until it finishes; `finish_reason` is set once.
    """

    def __init__(
        self,
        group: RequestGroup,
        index: int,
        seed: int,
        stop_ids: frozenset[int],
        eos_ids: frozenset[int],
        text: OutputText,
    ):
        self.group = group
        self.index = index
        self.seed = seed
        self.eos_ids = eos_ids
        self.stop_ids = stop_ids
        self.text = text
        self.needs_full_sampler = group.params.needs_full_sampler
        self.wants_score = index == 0 and group.params.prompt_logprobs is not None
        self.output_token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.slot: int | None = None
        self.num_cached = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def params(self) -> SamplingParams:
        return self.group.params

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.group.prompt_token_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Returns a stretch of prompt and output together, shorter where these end."""
        num_prompt = len(self.prompt_token_ids)
        from_output = self.output_token_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]
        return [*self.prompt_token_ids[start:stop], *from_output]

    @property
    def page(self) -> int:
        """The page that its slot is; RuntimeError where it holds none."""
        if self.slot is None:
            raise RuntimeError("a request without a slot was scheduled")
        return self.slot

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.num_cached < len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def banned_ids(self) -> frozenset[int]:
        """Tokens that would end the request before `min_tokens`."""
        if len(self.output_token_ids) < self.params.min_tokens:
            return self.eos_ids | self.stop_ids
        return frozenset()

    def append(self, token_id: int, max_model_len: int) -> None:
        """Adds a sampled token and decides whether it is the last."""
        self.output_token_ids.append(token_id)
        may_stop = len(self.output_token_ids) > self.params.min_tokens
        if token_id in self.eos_ids:
            self._end("stop", None, token_id)
        elif token_id in self.stop_ids:
            self._end("stop", token_id, token_id)
        elif (match := self.text.add(token_id, may_stop=may_stop)) is not None:
            self._end("stop", match.stop)
        elif self.num_tokens >= max_model_len or len(self.output_token_ids) == self.params.max_tokens:
            match = self.text.finish(may_stop=may_stop)
            self._end("length" if match is None else "stop", None if match is None else match.stop)

    def _end(self, finish_reason: str, stop_reason: str | int | None, last_token_id: int | None = None) -> None:
        """Finishes; a token that ended the request shows as text only where the parameters ask for it."""
        if last_token_id is not None and self.params.include_stop_str_in_output:
            self.text.add(last_token_id, may_stop=False)
        self.text.finish(may_stop=False)
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason

    def to_output(self) -> CompletionOutput:
        """Returns a copy of what there is so far."""
        return CompletionOutput(
            index=self.index,
            text=self.text.visible,
            token_ids=tuple(self.output_token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestGroup:
    """What a user asked for under one id: a prompt and its `n` continuations, which share the prompt's scores."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        eos_ids: Sequence[int],
        tokenizer: Any,
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.params = params
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        ends = frozenset(() if params.ignore_eos else eos_ids)
        stops = frozenset(params.stop_token_ids)
        self.requests = tuple(
            Request(self, index, seed + index, stops, ends, OutputText(tokenizer, params, self.prompt_token_ids))
            for index in range(params.n)
        )

    @property
    def is_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)

    def to_output(self) -> RequestOutput:
        """Returns a copy of what there is so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            outputs=tuple(request.to_output() for request in self.requests),
            finished=self.is_finished,
        )
