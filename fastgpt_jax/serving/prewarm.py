"""Fills the prefix cache before the first request comes, from a log of prompts.

Knows no HTTP. The one idea: the prompts that were asked most often are run for one token each, the most frequent last,
so that their pages are the last that would leave the cache; what they begin with, all others that begin so find too.

A line of the log is a JSON object with `prompt` (text, or token ids), `messages` (a chat) or `body` (a request that
holds one of these, as in a batch file).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgpt_jax.engine.prompts import encode_prompt
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.serving.body import validate
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.prompts import encode_turns
from fastgpt_jax.serving.protocol_chat import ChatRequest
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

SHARE = 0.9
"""Of the prompts of the log, repetitions included, that are to find their prefix."""
_CHAT = ("messages", "add_generation_prompt", "chat_template_kwargs")
"""Fields that make the prompt of a chat."""


@dataclasses.dataclass(frozen=True)
class Prewarmed:
    """What was done: how many prompts the log has, how many different ones were run, and their share of the log."""

    num_prompts: int
    num_run: int
    num_tokens: int
    share: float


def prewarm(engine: Any, log: Path, *, template: ChatTemplate | None = None, salts: Sequence[str] = ("",)) -> Prewarmed:
    """Runs the most frequent prompts of a log.

    Args:
      engine: An `LLMEngine` that has nothing to do.
      template: Makes prompts of chats, as `/v1/chat/completions` does; None where the model has none.
      salts: Each has a part of the prefix cache of its own.

    Raises:
      UserError: The log cannot be read, or a line is no prompt that the model takes.
    """
    counted = Counter(_read(engine, log, template))
    total = sum(counted.values())
    layout, chosen, num_tokens, num_seen = engine.compiled.layout, [], 0, 0
    room = getattr(layout, "num_pages", engine.compiled.max_num_seqs) * layout.page_size
    for token_ids, count in counted.most_common():
        if num_seen >= SHARE * total or (num_tokens + len(token_ids)) * len(salts) > room:
            break
        chosen.append(token_ids)
        num_tokens += len(token_ids)
        num_seen += count
    for salt in salts:
        _run(engine, chosen[::-1], salt)
    return Prewarmed(total, len(chosen), num_tokens, num_seen / total if total else 0.0)


def _run(engine: Any, prompts: Sequence[tuple[int, ...]], salt: str) -> None:
    params = SamplingParams(max_tokens=1, temperature=0)
    options = {"cache_salt": salt} if salt else {}
    for index, token_ids in enumerate(prompts):
        engine.add_request(f"prewarm-{index}", {"prompt_token_ids": list(token_ids)}, params, **options)
        while engine.has_unfinished_requests():
            engine.step()


def _read(engine: Any, log: Path, template: ChatTemplate | None) -> Iterator[tuple[int, ...]]:
    """Yields the prompts as token ids."""
    params = SamplingParams(max_tokens=1, temperature=0)
    for number, line in enumerate(_lines(log), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            fields = fields.get("body", fields) if isinstance(fields, dict) else fields
            _, token_ids = _encode(fields, engine.tokenizer, template)
            engine.check_request({"prompt_token_ids": token_ids}, params)
        except (UserError, ApiError, json.JSONDecodeError) as error:
            raise UserError(f"{log}, line {number}: {error}") from error
        yield tuple(token_ids)


def _lines(log: Path) -> Iterator[str]:
    try:
        with log.open(encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise UserError(f"cannot read --prewarm {log}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prewarm {log} is no UTF-8 text: {error}") from error


def _encode(fields: Any, tokenizer: Any, template: ChatTemplate | None) -> tuple[str | None, list[int]]:
    if not isinstance(fields, dict) or not ("prompt" in fields or "messages" in fields):
        raise UserError("a line must be a JSON object with prompt, messages or body")
    if "prompt" in fields:
        return encode_prompt(fields["prompt"], tokenizer)
    if template is None or tokenizer is None:
        raise UserError("the model has no chat template, so that messages are no prompt; give prompt")
    chat = validate(ChatRequest, {name: fields[name] for name in _CHAT if name in fields}, {})
    return encode_turns(template, tokenizer, chat.messages, chat.add_generation_prompt, chat.chat_template_kwargs)
