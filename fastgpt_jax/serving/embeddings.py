"""`/v1/embeddings`: a vector of length 1 for each input, from what the model's last layer says after its last token."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.serving.answers import json_answer
from fastgpt_jax.serving.body import read_body, validate
from fastgpt_jax.serving.limits import check_context, check_most
from fastgpt_jax.serving.openapi import documents
from fastgpt_jax.serving.prompts import encode_prompts
from fastgpt_jax.serving.protocol import EmbeddingList, EmbeddingRequest
from fastgpt_jax.serving.running import deadline_exceeded, unless_gone
from fastgpt_jax.serving.state import new_id, server_of

router = APIRouter()
# A vector cut short is another model's business: this one was not trained for it.
UNSUPPORTED_EMBEDDINGS: dict[str, tuple[Any, ...]] = {"dimensions": ()}


@router.post("/v1/embeddings", **documents(EmbeddingRequest, EmbeddingList, runs=True))
async def create_embeddings(request: Request) -> Response:
    """Embeds texts or token ids; what texts spell is never a special token."""
    server = server_of(request)
    server.check_ready()
    asked = validate(EmbeddingRequest, await read_body(request, server.settings), UNSUPPORTED_EMBEDDINGS)
    server.check_model(asked.model)
    request.state.user = asked.user
    check_most("input", "inputs", len(asked.input), server.settings.max_prompts)
    inputs = await encode_prompts(server, "input", asked.input, parse_special=False)
    check_context("input", [len(ids) for _, ids in inputs], None, server.llm.max_model_len)
    prompts = [{"prompt": text, "prompt_token_ids": ids} for text, ids in inputs]
    work = server.llm.embed(new_id("embd"), prompts, cache_salt=server.cache_salt(request, asked.cache_salt))
    try:
        async with asyncio.timeout(server.deadline_s(asked.deadline_s)):
            outputs = await unless_gone(request.receive, work)
    except TimeoutError:
        raise deadline_exceeded() from None
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return json_answer(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _write(output.embedding, asked.encoding_format)}
                for index, output in enumerate(outputs)
            ],
            "model": asked.model or server.settings.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _write(vector: Any, encoding_format: str) -> list[float] | str:
    array = np.asarray(vector, np.dtype("<f4"))
    return base64.b64encode(array.tobytes()).decode() if encoding_format == "base64" else array.tolist()
