"""From the bytes of a request to a checked value: size, time, UTF-8, JSON, depth, numbers, fields.

Knows no route. The one idea: what is refused is refused as early as it can be known: a body too large by its header
before a byte is read, one too deep before a field is looked at; and every mistake names the field it lies in.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.settings import ServerSettings

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """Reads a JSON object."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            "unsupported_media_type", f"the body must be application/json, got {ascii(kind)[1:-1] or 'none'}"
        )
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            content = await _read_bytes(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError("body_timeout", f"the body did not arrive within {settings.body_timeout_s:g} s") from None
    return parse_object(content, settings.max_json_depth)


def parse_object(content: bytes, max_depth: int) -> dict[str, Any]:
    """Parses a JSON object whose numbers are finite; of a name that occurs twice, the last value counts."""
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError("invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_json", "the body must be a JSON object")
    _check_values(value, max_depth)
    return value


def validate(model: type[Model], values: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> Model:
    """Checks the fields of a body. One that is null counts as absent.

    Args:
      unsupported: Fields of OpenAI's that do nothing here, each with the values that ask for nothing; with another
        value they are refused, as is every field that nobody knows.
    """
    given = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in unsupported:
            given[name] = value
        elif not any(value == neutral and type(value) is type(neutral) for neutral in unsupported[name]):
            raise ApiError("unsupported_parameter", f"{name} is not supported by this server; leave it out", name)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _field_error(error.errors(include_url=False, include_input=False)[0]) from None


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise body_too_large(max_bytes)
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise body_too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def body_too_large(max_bytes: int) -> ApiError:
    """The answer to a body that is too large."""
    # The connection stays open and the rest is thrown away: to close it now would take the answer from a client that
    # still writes.
    return ApiError("body_too_large", f"the body may have {max_bytes} bytes at most")


def _check_values(root: Any, max_depth: int) -> None:
    """Refuses what is nested too deep, and numbers too large to be finite."""
    level = [root]
    for depth in range(max_depth + 1):
        if not level:
            return
        if depth == max_depth:
            raise ApiError("limit_exceeded", f"the body may be nested {max_depth} levels deep at most")
        inner: list[Any] = []
        for container in level:
            for value in container.values() if isinstance(container, dict) else container:
                kind = type(value)
                if kind is dict or kind is list:
                    inner.append(value)
                elif kind is float and not math.isfinite(value):
                    raise ApiError("invalid_json", "the body holds a number that is not finite")
        level = inner


def _field_error(details: ErrorDetails) -> ApiError:
    param = _path(details["loc"])
    message = details["msg"]
    match details["type"]:
        case "missing":
            return ApiError("missing_required_parameter", f"{param} is required", param)
        case "extra_forbidden":
            return ApiError("unsupported_parameter", f"{param} is not a parameter of this route", param)
        case "value_error":
            error = details.get("ctx", {}).get("error")
            if isinstance(error, FieldError):
                return ApiError(error.code, str(error), error.param or param or None)
    code = "invalid_type" if details["type"].endswith("_type") else "invalid_value"
    return ApiError(code, f"{param}: {message[:1].lower()}{message[1:]}", param)


class FieldError(ValueError):
    """Raised by a field's own check, with the code of its answer; `param` where it is deeper than the field."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
