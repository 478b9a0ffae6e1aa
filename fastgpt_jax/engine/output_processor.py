"""From tokens to what users get: text, stop strings, log-probabilities in words.

Knows no device and no scheduling. The one idea: it keeps its own account of every request, fed by updates in order, so
that it may run behind the core, on the same thread. It tells the core of nothing but texts that ended; a text that
cannot be made, since a tokenizer raised, is one of them, and no other request's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastgpt_jax.engine.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput
from fastgpt_jax.engine.request import Request, RequestGroup
from fastgpt_jax.engine.results import describe
from fastgpt_jax.engine.stats import RequestMetrics
from fastgpt_jax.engine.text import OutputText
from fastgpt_jax.engine.updates import TokenScore, Update
from fastgpt_jax.sampling.params import SamplingParams

Output = RequestOutput | EmbeddingOutput


class _Continuation:
    """What there is of one continuation.

    Invariants: after `finish_reason` is set nothing is added.
    """

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Any):
        self.request = request
        self.params = params
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.text = OutputText(tokenizer, params, request.prompt_token_ids)

    def add(self, update: Update) -> str | None:
        """Takes an update; returns the stop string that ends the text before the core knows."""
        stop = None if update.token is None else self._add_token(update)
        if update.finish_reason is not None and self.finish_reason is None:
            self._end(update.finish_reason, update.stop_reason)
        return stop

    def _add_token(self, update: Update) -> str | None:
        if update.token is None:
            return None
        token_id, group = update.token.token_id, self.request.group
        self.token_ids.append(token_id)
        self.cumulative_logprob += update.token.logprob
        is_end = token_id in group.eos_ids or token_id in group.stop_ids
        if is_end and not self.params.include_stop_str_in_output:
            return None
        may_stop = not is_end and len(self.token_ids) > group.min_tokens
        match = self.text.add(token_id, may_stop=may_stop)
        if match is None and update.finish_reason == "length":
            match = self.text.finish(may_stop=may_stop)
        if match is None:
            return None
        self._end("stop", match.stop)
        return match.stop if update.finish_reason is None else None

    def _end(self, finish_reason: str, stop_reason: str | int | None) -> None:
        self.text.finish(may_stop=False)
        self.finish_reason, self.stop_reason = finish_reason, stop_reason

    def cut_off(self, finish_reason: str) -> None:
        """Ends with what there is, whether or not the tokenizer makes text of the last of it."""
        with contextlib.suppress(Exception):
            self.text.finish(may_stop=False)
        self.finish_reason = finish_reason

    def to_output(self) -> CompletionOutput:
        """Returns a copy of what there is so far."""
        return CompletionOutput(
            index=self.request.index,
            text=self.text.visible,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class _Group:
    """What there is of all continuations of a prompt."""

    def __init__(self, group: RequestGroup, tokenizer: Any):
        self.group = group
        self.first_token: float | None = None
        self.finished: float | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.error: str | None = None
        params = group.params
        self.continuations = (
            [_Continuation(request, params, tokenizer) for request in group.requests]
            if isinstance(params, SamplingParams)
            else []
        )

    @property
    def is_finished(self) -> bool:
        return all(continuation.finish_reason is not None for continuation in self.continuations)

    @property
    def metrics(self) -> RequestMetrics:
        group = self.group
        return RequestMetrics(
            group.arrival, group.first_scheduled, self.first_token, self.finished, group.num_cached_tokens
        )

    def to_output(self) -> RequestOutput:
        """Returns a copy of what there is so far."""
        group = self.group
        wants_scores = isinstance(group.params, SamplingParams) and group.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            prompt_logprobs=tuple(self.prompt_logprobs) if wants_scores else None,
            outputs=tuple(continuation.to_output() for continuation in self.continuations),
            finished=self.is_finished,
            metrics=self.metrics,
            error=self.error,
        )


class OutputProcessor:
    """Keeps the account of unfinished requests."""

    def __init__(
        self,
        tokenizer: Any,
        on_end: Callable[[Request, str, str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args: on_end: Told of a continuation that ends before the core knows, with finish reason and stop string."""
        self._tokenizer = tokenizer
        self._on_end = on_end
        self._clock = clock
        self._groups: dict[str, _Group] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._groups)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def unfinished(self) -> set[int]:
        """Identities of the continuations that have not ended."""
        groups = self._groups.values()
        ended = {id(c.request) for group in groups for c in group.continuations if c.finish_reason is not None}
        return {id(request) for group in groups for request in group.group.requests} - ended

    def add(self, group: RequestGroup) -> None:
        """Opens the account of a request."""
        self._groups[group.request_id] = _Group(group, self._tokenizer)

    def requests(self, request_id: str) -> tuple[Request, ...]:
        """All continuations of an unfinished request; none where there is no such request."""
        group = self._groups.get(request_id)
        return () if group is None else group.group.requests

    def abort(self, request_id: str) -> Output | None:
        """Closes an account; returns what there was, or None where there is no such request."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return None
        group.finished = self._clock()
        for continuation in group.continuations:
            if continuation.finish_reason is None:
                continuation.cut_off("abort")
        return group.to_output()

    def process(self, updates: Iterable[Update]) -> list[Output]:
        """Takes updates in order; returns the requests that got a token or an end, with all they have so far."""
        told: dict[str, Output | None] = {}
        for update in updates:
            name = update.request.group.request_id
            group = self._groups.get(name)
            if group is None or group.group is not update.request.group:
                continue
            if update.hidden is not None:
                told[name] = self._embedding(group, update)
            elif self._try_add(group, update):
                told[name] = None
        return [self._close(name) if output is None else output for name, output in told.items()]

    def _try_add(self, group: _Group, update: Update) -> bool:
        """The same as `_add`; a tokenizer that raises ends the continuation, and nothing else."""
        try:
            return self._add(group, update)
        except Exception as error:
            group.error = describe(error)
            group.continuations[update.request.index].cut_off("error")
            self._on_end(update.request, "error", None)
            return True

    def _add(self, group: _Group, update: Update) -> bool:
        """Takes an update; returns whether there is something to tell."""
        if not group.continuations:
            group.error = update.error
            return True
        continuation, params = group.continuations[update.request.index], group.continuations[0].params
        if update.prompt_scores and params.prompt_logprobs is not None:
            num = params.prompt_logprobs
            group.prompt_logprobs += [self._logprobs(score, num) for score in update.prompt_scores]
        if continuation.finish_reason is not None or (update.token is None and update.finish_reason is None):
            return False
        if update.token is not None:
            if group.first_token is None:
                group.first_token = self._clock()
            if params.logprobs is not None:
                continuation.logprobs.append(self._logprobs(update.token, params.logprobs))
        group.error = update.error or group.error
        stop = continuation.add(update)
        if stop is not None:
            self._on_end(update.request, "stop", stop)
        return True

    def _close(self, name: str) -> Output:
        """Returns what there is of a request; where it is finished, it is forgotten."""
        group = self._groups[name]
        if group.is_finished:
            group.finished = self._clock()
            del self._groups[name]
        return group.to_output()

    def _embedding(self, group: _Group, update: Update) -> EmbeddingOutput:
        group.first_token = group.finished = self._clock()
        del self._groups[group.group.request_id]
        hidden = np.asarray(update.hidden, np.float32)
        return EmbeddingOutput(
            request_id=group.group.request_id,
            embedding=hidden / max(float(np.linalg.norm(hidden)), np.finfo(np.float32).tiny),
            prompt_token_ids=group.group.prompt_token_ids,
            metrics=group.metrics,
        )

    def _logprobs(self, token: TokenScore, num: int) -> dict[int, Logprob]:
        """Returns a token's own log-probability and those of the `num` most likely tokens."""
        if token.rank is None:
            raise RuntimeError("log-probabilities were asked for and not brought")
        result = {token.token_id: Logprob(token.logprob, token.rank, self._token_text(token.token_id))}
        for rank in range(min(num, len(token.top_ids))):
            top_id = int(token.top_ids[rank])
            if top_id not in result:
                result[top_id] = Logprob(float(token.top_logprobs[rank]), rank + 1, self._token_text(top_id))
        return result

    def _token_text(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        if hasattr(self._tokenizer, "detokenizer"):
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id])
