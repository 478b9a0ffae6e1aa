"""`/v1/chat/completions`: continues a conversation, by way of the model's own template.

Knows no engine but its outputs. The one idea: the template makes a prompt of the conversation and everything after
that is a completion; only its form differs, which says who speaks before the first word, and after the last why it
ended.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.serving import logprobs as forms
from fastgpt_jax.serving.answers import News, event, follow, json_answer, make_usage, whole_news
from fastgpt_jax.serving.body import read_body, validate
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.limits import check_context, check_messages, check_sampling
from fastgpt_jax.serving.openapi import documents
from fastgpt_jax.serving.prompts import Encoded, encode_messages
from fastgpt_jax.serving.protocol_chat import UNSUPPORTED_CHAT, ChatChunk, ChatCompletion, ChatRequest
from fastgpt_jax.serving.running import Job, collect, stream, unless_gone
from fastgpt_jax.serving.sampling_request import check_stream_options, make_sampling_params
from fastgpt_jax.serving.sse import answer_stream
from fastgpt_jax.serving.state import Server, new_id, server_of

router = APIRouter()
NOTHING: Mapping[str, Any] = MappingProxyType({})


@router.post("/v1/chat/completions", **documents(ChatRequest, ChatCompletion, chunk=ChatChunk, runs=True))
async def create_chat_completion(request: Request) -> Response:
    """Continues a conversation."""
    server = server_of(request)
    server.check_ready()
    body = await read_body(request, server.settings)
    check_messages(body, server.settings)
    asked = validate(ChatRequest, body, UNSUPPORTED_CHAT)
    server.check_model(asked.model)
    request.state.user = asked.user or asked.safety_identifier
    check_stream_options(asked)
    check_sampling(asked, 1, server.settings)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError("invalid_value", "top_logprobs goes with logprobs: true", "top_logprobs")
    prompt = await encode_messages(
        server,
        asked.messages,
        add_generation_prompt=asked.add_generation_prompt,
        variables=asked.chat_template_kwargs,
    )
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    check_context("messages", [len(prompt[1])], max_tokens, server.llm.max_model_len)
    answer = _Answer(server, asked, new_id("chatcmpl"), await server.token_bytes() if asked.logprobs else None)
    job = answer.job(prompt, max_tokens, server.cache_salt(request, asked.cache_salt))
    if asked.stream:
        return await answer_stream(request, answer.events(job))
    return json_answer(answer.whole(await unless_gone(request.receive, collect(server.llm, [job]))))


class _Answer:
    """One answer."""

    def __init__(self, server: Server, asked: ChatRequest, answer_id: str, token_bytes: Sequence[bytes] | None):
        self._server, self._asked, self._id, self._token_bytes = server, asked, answer_id, token_bytes
        self._created = int(time.time())

    def job(self, prompt: Encoded, max_tokens: int | None, cache_salt: str) -> Job:
        """What the engine is asked for."""
        asked, server = self._asked, self._server
        num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        params = make_sampling_params(asked, server, max_tokens=max_tokens, logprobs=num_top)
        text, ids = prompt
        return Job(self._id, text, ids, params, asked.priority, server.deadline_s(asked.deadline_s), cache_salt)

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer, when all is done."""
        choices = [
            {
                "index": news.continuation.index,
                "message": {"role": "assistant", "content": news.text, "refusal": None},
                "logprobs": self._logprobs(news),
                **self._end(news),
                **self._ids(news),
            }
            for news in whole_news(outputs)
        ]
        return {
            **self._frame("chat.completion", choices),
            "usage": make_usage(outputs),
            **self._prompt_logprobs(outputs[0]),
        }

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The chunks as they come: who speaks, the words, why it ended, and tokens counted where that was asked for."""
        options = self._asked.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        latest: dict[int, RequestOutput] = {}

        def chunk(
            index: int, delta: dict[str, Any], logprobs: Any = None, frame: Mapping[str, Any] = NOTHING, **more: Any
        ) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **more}
            return event({**self._frame("chat.completion.chunk", [choice]), **usage, **frame})

        of_prompt: dict[str, Any] | None = None
        async with aclosing(stream(self._server.llm, [job])) as outputs:
            async for news in follow(outputs, latest, every_token=self._asked.return_token_ids):
                index = news.continuation.index
                if news.is_first:
                    # The choices have one prompt, so it is told with the first of them.
                    of_prompt = self._prompt_logprobs(news.output) if of_prompt is None else {}
                    yield chunk(index, {"role": "assistant", "content": ""}, frame=of_prompt)
                if news.token_ids:
                    yield chunk(index, {"content": news.text}, self._logprobs(news), **self._ids(news))
                if news.continuation.finish_reason is not None:
                    yield chunk(index, {}, **self._end(news))
        if usage:
            yield event({**self._frame("chat.completion.chunk", []), "usage": make_usage(latest.values())})

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model or self._server.settings.model_name,
            **self._server.fingerprint_field,
            "choices": choices,
        }

    def _prompt_logprobs(self, output: RequestOutput) -> dict[str, Any]:
        """Of the prompt's tokens, where they were asked for."""
        if self._asked.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": forms.prompt_logprobs(output.prompt_logprobs or ())}

    def _end(self, news: News) -> dict[str, Any]:
        return {"finish_reason": news.continuation.finish_reason, "stop_reason": news.continuation.stop_reason}

    def _ids(self, news: News) -> dict[str, Any]:
        """Token ids, where they were asked for."""
        if not self._asked.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": list(news.output.prompt_token_ids)} if news.is_first else {}
        return {"token_ids": list(news.token_ids), **prompt}

    def _logprobs(self, news: News) -> dict[str, Any] | None:
        """Of the tokens that are new; None where they were not asked for."""
        if not self._asked.logprobs:
            return None
        rows = list(news.continuation.logprobs or ())[news.first_token :]
        num_top = self._asked.top_logprobs or 0
        return forms.chat_logprobs(news.token_ids, rows, num_top, self._server.llm.tokenizer, self._token_bytes)
