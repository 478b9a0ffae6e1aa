"""`/tokenize` and `/detokenize`: what the model sees of a text, and the text of what it says.

The one idea: no more tokens than a context holds are given a text, and that on another thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.serving.answers import json_answer
from fastgpt_jax.serving.body import read_body, validate
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.limits import check_messages, check_most, check_vocabulary
from fastgpt_jax.serving.logprobs import prompt_text, token_text
from fastgpt_jax.serving.openapi import documents
from fastgpt_jax.serving.prompts import Encoded, encode_messages, encode_prompts
from fastgpt_jax.serving.protocol import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer
from fastgpt_jax.serving.protocol_chat import TokenizeRequest
from fastgpt_jax.serving.state import Server, server_of

router = APIRouter()
UNSUPPORTED_TOKENIZE: dict[str, tuple[Any, ...]] = {"continue_final_message": (False,), "tools": ([],)}


@router.post("/tokenize", **documents(TokenizeRequest, TokenizeAnswer))
async def tokenize(request: Request) -> Response:
    """Encodes a text, or the prompt that a conversation makes."""
    server = server_of(request)
    body = await read_body(request, server.settings)
    check_messages(body, server.settings)
    asked = validate(TokenizeRequest, body, UNSUPPORTED_TOKENIZE)
    server.check_model(asked.model)
    _, token_ids = await _encode(server, asked)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": server.llm.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if asked.return_token_strs:
        check_most("return_token_strs", "tokens with their texts", len(token_ids), server.llm.max_model_len)
        answer["token_strs"] = await asyncio.to_thread(_texts, token_ids, server.llm.tokenizer)
    return json_answer(answer)


@router.post("/detokenize", **documents(DetokenizeRequest, DetokenizeAnswer))
async def detokenize(request: Request) -> Response:
    """Decodes token ids, special tokens included."""
    server = server_of(request)
    asked = validate(DetokenizeRequest, await read_body(request, server.settings), {})
    server.check_model(asked.model)
    if server.llm.tokenizer is None:
        raise ApiError("tokenizer_missing", "the model has no tokenizer, so its tokens have no text")
    check_most("tokens", "tokens", len(asked.tokens), server.llm.max_model_len)
    check_vocabulary("tokens", asked.tokens, server.llm.vocab_size)
    return json_answer({"prompt": await asyncio.to_thread(prompt_text, asked.tokens, server.llm.tokenizer)})


def _texts(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    return [token_text(token_id, None, tokenizer) for token_id in token_ids]


async def _encode(server: Server, asked: TokenizeRequest) -> Encoded:
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError("invalid_value", "give either prompt or messages", "prompt")
    if asked.messages is not None:
        return await encode_messages(
            server,
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            variables=asked.chat_template_kwargs,
        )
    (encoded,) = await encode_prompts(
        server, "prompt", [asked.prompt or ""], may_be_empty=True, add_special_tokens=asked.add_special_tokens
    )
    return encoded
