"""`/openapi.json`: every route with what it takes, what it answers, and how it errs.

Knows no engine. The one idea: the classes of `protocol*.py` are the document; the routes read bodies themselves, so
they name the class instead of taking it as an argument.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fastgpt_jax.serving.protocol import DetokenizeRequest, EmbeddingRequest, ErrorAnswer
from fastgpt_jax.serving.protocol_chat import ChatChunk, ChatRequest, TokenizeRequest
from fastgpt_jax.serving.protocol_completions import Completion, CompletionRequest

_REF = "#/components/schemas/{model}"
_EXTRA_MODELS = (
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    Completion,
    ChatChunk,
    ErrorAnswer,
)
_ALWAYS = {
    401: "No key, or none of this server's",
    413: "Headers or body are too large",
    500: "A mistake of the server",
}
_WITH_BODY = {400: "The body is not what it must be", 404: "No such model"}
_RUNS = {429: "Too much waits already", 503: "Starting, shutting down or stopped", 504: "It took too long"}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}


def documents(
    takes: type[BaseModel] | None,
    gives: type[BaseModel],
    *,
    chunk: type[BaseModel] | None = None,
    runs: bool = False,
    errors: dict[int, str] | None = None,
) -> dict[str, Any]:
    """What a route's decorator needs to describe it.

    Args:
      chunk: The events of a stream, where it can be one.
      runs: Whether it runs the model.
      errors: Further statuses, with what they mean.
    """
    told = {**_ALWAYS, **(_WITH_BODY if takes else {}), **(_RUNS if runs else {}), **(errors or {})}
    responses: dict[int, Any] = {status: {"model": ErrorAnswer, "description": text} for status, text in told.items()}
    if 429 in responses:
        responses[429]["headers"] = _RETRY_AFTER
    responses[200] = {"model": gives, "description": "The answer"}
    if chunk is not None:
        responses[200]["content"] = {"text/event-stream": {"schema": _event_schema(chunk)}}
    extra = {}
    if takes is not None:
        schema = {"$ref": _REF.format(model=takes.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"response_model": None, "responses": responses, "openapi_extra": extra}


def _event_schema(chunk: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream: a chunk as JSON, an error where the stream breaks off, and the word that ends it."""
    kinds = [{"$ref": _REF.format(model=model.__name__)} for model in (chunk, ErrorAnswer)]
    told = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [{"const": "[DONE]"}, told]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def make_document(app: FastAPI, *, needs_key: bool, is_open: Any) -> dict[str, Any]:
    """The document.

    Args:
      is_open: Says of a path whether it needs no key.
    """
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, extra = models_json_schema([(model, "validation") for model in _EXTRA_MODELS], ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = {**extra.get("$defs", {}), **components.get("schemas", {})}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if is_open(path) else [{"key": []}]
    return document
