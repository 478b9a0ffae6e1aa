"""`/v1/completions`: continues prompts as they stand.

Knows no engine but its outputs. The one idea: an answer and its chunks have one form, a choice from one point of a
continuation to another; an answer is the chunk that goes from the beginning to the end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.serving import logprobs as forms
from fastgpt_jax.serving.answers import MAX_TOKENS_DEFAULT, News, event, follow, json_answer, make_usage, whole_news
from fastgpt_jax.serving.body import read_body, validate
from fastgpt_jax.serving.limits import check_context, check_sampling
from fastgpt_jax.serving.openapi import documents
from fastgpt_jax.serving.prompts import Encoded, encode_prompts
from fastgpt_jax.serving.protocol_completions import UNSUPPORTED_COMPLETIONS, Completion, CompletionRequest
from fastgpt_jax.serving.running import Job, collect, stream, unless_gone
from fastgpt_jax.serving.sampling_request import check_stream_options, make_sampling_params
from fastgpt_jax.serving.sse import answer_stream
from fastgpt_jax.serving.state import Server, new_id, server_of

router = APIRouter()


@router.post("/v1/completions", **documents(CompletionRequest, Completion, chunk=Completion, runs=True))
async def create_completion(request: Request) -> Response:
    """Continues prompts."""
    server = server_of(request)
    server.check_ready()
    asked = validate(CompletionRequest, await read_body(request, server.settings), UNSUPPORTED_COMPLETIONS)
    server.check_model(asked.model)
    request.state.user = asked.user or asked.safety_identifier
    check_stream_options(asked)
    check_sampling(asked, len(asked.prompt), server.settings)
    prompts = await encode_prompts(server, "prompt", asked.prompt)
    check_context("prompt", [len(ids) for _, ids in prompts], asked.max_tokens, server.llm.max_model_len)
    answer = _Answer(server, asked, new_id("cmpl"))
    jobs = answer.jobs(prompts, server.cache_salt(request, asked.cache_salt))
    if asked.stream:
        return await answer_stream(request, answer.events(jobs))
    return json_answer(answer.whole(await unless_gone(request.receive, collect(server.llm, jobs))))


class _Answer:
    """One answer. Invariant: choice `i * n + j` is continuation `j` of prompt `i`."""

    def __init__(self, server: Server, asked: CompletionRequest, answer_id: str):
        self._server, self._asked, self._id = server, asked, answer_id
        self._created = int(time.time())
        self._drops_output = asked.max_tokens == 0
        self._offsets: dict[tuple[int, int], int] = {}

    def jobs(self, prompts: Sequence[Encoded], cache_salt: str) -> list[Job]:
        """What the engine is asked for; no engine generates nothing, so where that is asked its token is dropped."""
        asked = self._asked
        max_tokens = MAX_TOKENS_DEFAULT if asked.max_tokens is None else max(asked.max_tokens, 1)
        more = {"prompt_logprobs": asked.logprobs} if asked.echo and asked.logprobs is not None else {}
        if asked.prompt_logprobs is not None:
            more["prompt_logprobs"] = max(asked.prompt_logprobs, *more.values(), 0)
        params = make_sampling_params(asked, self._server, max_tokens=max_tokens, logprobs=asked.logprobs, **more)
        deadline_s = self._server.deadline_s(asked.deadline_s)
        return [
            Job(f"{self._id}-{index}", text, ids, params, asked.priority, deadline_s, cache_salt)
            for index, (text, ids) in enumerate(prompts)
        ]

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer, when all is done."""
        choices = [self._choice(news) for news in whole_news(outputs)]
        return {**self._frame(choices), "usage": make_usage(outputs, drops_output=self._drops_output)}

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[bytes, None]:
        """The chunks as they come; the last one counts tokens where that was asked for."""
        options = self._asked.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        latest: dict[int, RequestOutput] = {}
        async with aclosing(stream(self._server.llm, jobs)) as outputs:
            async for news in follow(outputs, latest, every_token=self._asked.return_token_ids):
                yield event({**self._frame([self._choice(news)]), **usage})
        if usage:
            yield event({**self._frame([]), "usage": make_usage(latest.values(), drops_output=self._drops_output)})

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._asked.model or self._server.settings.model_name,
            **self._server.fingerprint_field,
            "choices": choices,
        }

    def _choice(self, news: News) -> dict[str, Any]:
        """What is new of a continuation; the first news begin with what was asked of the prompt."""
        asked, ends = self._asked, news.continuation
        choice: dict[str, Any] = {
            "index": news.index * asked.n + ends.index,
            "text": self._prompt_text(news) + ("" if self._drops_output else news.text),
            "logprobs": None if asked.logprobs is None else self._logprobs(news, asked.logprobs),
            "finish_reason": "length" if self._drops_output else ends.finish_reason,
            "stop_reason": None if self._drops_output else ends.stop_reason,
        }
        if asked.return_token_ids:
            choice["token_ids"] = [] if self._drops_output else list(news.token_ids)
            if news.is_first:
                choice["prompt_token_ids"] = list(news.output.prompt_token_ids)
        if asked.prompt_logprobs is not None and news.is_first:
            choice["prompt_logprobs"] = forms.prompt_logprobs(news.output.prompt_logprobs or ())
        return choice

    def _prompt_text(self, news: News) -> str:
        """The prompt's text, where it is to be echoed now."""
        if not (self._asked.echo and news.is_first):
            return ""
        if news.output.prompt is not None:
            return news.output.prompt
        return forms.prompt_text(news.output.prompt_token_ids, self._server.llm.tokenizer)

    def _logprobs(self, news: News, num_top: int) -> dict[str, Any]:
        """Of the tokens that are new; those of an echoed prompt come first."""
        ids, rows = list(news.token_ids), list(news.continuation.logprobs or ())[news.first_token :]
        if self._drops_output:
            ids, rows = [], []
        if self._asked.echo and news.is_first:
            ids = [*news.output.prompt_token_ids, *ids]
            rows = [*(news.output.prompt_logprobs or ()), *rows]
        key = news.index, news.continuation.index
        offset = self._offsets.get(key, 0)
        told = forms.completion_logprobs(ids, rows, num_top, self._server.llm.tokenizer, offset)
        self._offsets[key] = offset + sum(map(len, told["tokens"]))
        return told
