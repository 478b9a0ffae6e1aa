"""What a client is told when a request is not answered: OpenAI's error object, all four fields, always.

Knows no route. The one idea: whatever goes wrong has a code, and one table says which status and type go with it, so
that no two routes answer the same mistake differently and no text of an exception reaches a client.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.unavailable import Aborted, Draining, EngineDead, Overloaded, StepFailed, Unavailable

_INVALID, _SERVER = "invalid_request_error", "server_error"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a code stands for: the status of the answer, and the error's type."""

    status: int
    type: str = _INVALID


CODES: Mapping[str, Kind] = MappingProxyType(
    {
        "invalid_json": Kind(400),
        "invalid_value": Kind(400),
        "invalid_type": Kind(400),
        "missing_required_parameter": Kind(400),
        "unsupported_parameter": Kind(400),
        "unsupported_media_type": Kind(400),
        "limit_exceeded": Kind(400),
        "context_length_exceeded": Kind(400),
        "chat_template_missing": Kind(400),
        "chat_template_refused": Kind(400),
        "tokenizer_missing": Kind(400),
        "body_timeout": Kind(400),
        "invalid_api_key": Kind(401, "authentication_error"),
        "route_not_found": Kind(404),
        "model_not_found": Kind(404),
        "method_not_allowed": Kind(405),
        "conflict": Kind(409),
        "body_too_large": Kind(413),
        "headers_too_large": Kind(413),
        "overloaded": Kind(429, "rate_limit_error"),
        "internal_error": Kind(500, _SERVER),
        "step_failed": Kind(500, _SERVER),
        "not_ready": Kind(503, _SERVER),
        "draining": Kind(503, _SERVER),
        "engine_stopped": Kind(503, _SERVER),
        "deadline_exceeded": Kind(504, "timeout_error"),
    }
)
"""Every code there is."""


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      code: One of `CODES`.
      param: The field at fault, as the client wrote it; None where none is.
      headers: For the answer.
    """

    def __init__(self, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.code, self.message, self.param, self.headers = code, message, param, dict(headers or {})

    @property
    def status(self) -> int:
        return CODES[self.code].status

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        kind = CODES[self.code]
        return {"error": {"message": self.message, "type": kind.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        content = json.dumps(self.body(), ensure_ascii=True).encode()
        return Response(content, self.status, self.headers, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception; one that is nobody's mistake but ours says nothing of itself."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError("invalid_value", str(error))
        case Overloaded():
            return ApiError("overloaded", str(error), headers={"Retry-After": str(error.retry_after_s)})
        case Draining():
            return ApiError("draining", str(error), headers={"Retry-After": "1"})
        case Aborted():
            return ApiError("draining", str(error), headers={"Retry-After": "1"})
        case EngineDead():
            return ApiError("engine_stopped", str(error))
        case StepFailed():
            return ApiError("step_failed", str(error))
        case Unavailable():
            return ApiError("not_ready", str(error))
        case _:
            return ApiError("internal_error", "the server made a mistake; its log says which")


def route_error(error: HTTPException, request: Request) -> ApiError:
    """The answer where the router found no route: a wrong path, or a method that it does not take."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        return ApiError("method_not_allowed", f"there is no {where}; see Allow", headers=error.headers)
    return ApiError("route_not_found", f"there is no {where}; /openapi.json lists what there is")
