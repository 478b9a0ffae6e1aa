"""Pieces that the answers of completions and chats share: bytes, usage, what is new since the last chunk.

Knows no engine. The one idea: an answer is a dictionary of what `protocol*.py` describes, written once as JSON; tests
hold both together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any

from starlette.responses import Response

from fastgpt_jax.engine.outputs import CompletionOutput, RequestOutput

MAX_TOKENS_DEFAULT = 16
"""Of completions, as OpenAI documents it; a chat may fill the context."""


def to_json(value: Any) -> bytes:
    """Compact JSON; a number that JSON does not have is a ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_answer(value: Any) -> Response:
    """An answer whose body is a value."""
    return Response(to_json(value), media_type="application/json")


def event(chunk: Any) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + to_json(chunk) + b"\n\n"


def make_usage(outputs: Iterable[RequestOutput], *, drops_output: bool = False) -> dict[str, Any]:
    """Tokens of prompts, each counted once, and of continuations.

    Args:
      drops_output: Whether the generated token is not given out, since none was asked for.
    """
    prompt, generated, cached = 0, 0, 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        cached += getattr(getattr(output, "metrics", None), "num_cached_tokens", 0)
        generated += 0 if drops_output else sum(len(one.token_ids) for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclasses.dataclass(frozen=True)
class News:
    """What is new of one continuation: `text`, and its tokens from `first_token` on."""

    index: int
    output: RequestOutput
    continuation: CompletionOutput
    text: str
    first_token: int

    @property
    def is_first(self) -> bool:
        return self.first_token == 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.continuation.token_ids[self.first_token :]


def whole_news(outputs: Sequence[RequestOutput]) -> list[News]:
    """All of all continuations, as one piece of news each."""
    return [
        News(index, output, continuation, continuation.text, 0)
        for index, output in enumerate(outputs)
        for continuation in output.outputs
    ]


async def follow(
    outputs: AsyncIterable[tuple[int, RequestOutput]], latest: dict[int, RequestOutput], *, every_token: bool
) -> AsyncIterator[News]:
    """What is new in each output, where it is worth telling: text, or the end.

    Args:
      latest: Is given the newest output of each prompt.
      every_token: Whether a token without text is worth telling too.
    """
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    async for index, output in outputs:
        latest[index] = output
        for continuation in output.outputs:
            key = index, continuation.index
            num_chars, num_tokens = seen.get(key, (0, 0))
            if num_tokens < 0:
                continue
            has_token = len(continuation.token_ids) > num_tokens
            is_end = continuation.finish_reason is not None
            if not (is_end or (has_token and (every_token or len(continuation.text) > num_chars))):
                continue
            if not _has_scores(output):
                continue
            yield News(index, output, continuation, continuation.text[num_chars:], num_tokens)
            # An ended continuation is in later outputs too, while its siblings run.
            seen[key] = len(continuation.text), -1 if is_end else len(continuation.token_ids)


def _has_scores(output: RequestOutput) -> bool:
    """Whether the prompt's log-probabilities are there, where they were asked for: they come with the first answer."""
    return output.prompt_logprobs is None or len(output.prompt_logprobs) == len(output.prompt_token_ids)
