"""The page at `/` to try a model by hand: files as they lie in `static/`, nothing built, nothing from elsewhere.

Knows no model: the page asks the API as every client does. The one idea: the browser is told to load and to ask nothing
but this server, so that what a model writes stays text.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastgpt_jax.serving.errors import ApiError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
INDEX = "index.html"


def make_router() -> APIRouter:
    """Returns the routes `/` and `/static/{name}`."""
    files = _read_files()
    router = APIRouter()

    @router.get("/", summary="The playground", response_class=Response, responses=_described("text/html"))
    async def index(request: Request) -> Response:
        return files[INDEX].answer(request)

    @router.get(
        "/static/{name}",
        summary="A file of the playground",
        response_class=Response,
        responses={**_described("*/*"), 404: {"description": "No such file"}},
    )
    async def static(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError("route_not_found", "there is no such file; / is the page that names them all")
        return files[name].answer(request)

    return router


class _File:
    def __init__(self, name: str, content: bytes):
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        self._headers = {**HEADERS, "ETag": self._tag, "Content-Type": TYPES[name[name.rindex(".") :]]}

    def answer(self, request: Request) -> Response:
        """The file, or that the browser has it."""
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def _read_files() -> dict[str, _File]:
    """Reads all of them: a request never names a path."""
    folder = resources.files("fastgpt_jax") / "serving" / "static"
    return {file.name: _File(file.name, file.read_bytes()) for file in folder.iterdir() if file.is_file()}


def _described(media_type: str) -> dict[int | str, dict]:
    return {200: {"description": "The file", "content": {media_type: {"schema": {"type": "string"}}}}}
