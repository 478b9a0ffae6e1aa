"""`/v1/models`: what this server calls its one model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.serving.answers import json_answer
from fastgpt_jax.serving.openapi import documents
from fastgpt_jax.serving.protocol import ModelCard, ModelList
from fastgpt_jax.serving.state import OWNER, Server, server_of

router = APIRouter()


@router.get("/v1/models", **documents(None, ModelList))
async def list_models(request: Request) -> Response:
    """Lists the model under each of its names."""
    server = server_of(request)
    return json_answer({"object": "list", "data": [_card(server, name) for name in server.settings.served_model_names]})


@router.get("/v1/models/{model:path}", **documents(None, ModelCard, errors={404: "No such model"}))
async def retrieve_model(request: Request, model: str) -> Response:
    """Describes the model."""
    server = server_of(request)
    server.check_model(model)
    return json_answer(_card(server, model))


def _card(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": OWNER,
        "max_model_len": server.llm.max_model_len,
    }
