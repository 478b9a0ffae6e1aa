"""Who may ask: keys of a file, checked before a body is read.

Knows no route but those that are open. The one idea: everything needs a key unless it is on a short list, so that a
route added later is closed; keys are compared by digests, all of them every time, so that time tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health"})
OPEN_PREFIXES = ("/health/", "/static/")
METRICS_PATHS = frozenset({"/metrics", "/openapi.json"})
MAX_KEY_CHARS = 1024


def load_api_keys(path: str | Path) -> tuple[str, ...]:
    """Reads a file of keys, one a line; empty lines and lines that begin with `#` are none."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise UserError(f"cannot read api_key_file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the keys in {path} must be ASCII; byte {error.start} is not") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"{path} holds no key; write one a line, or leave api_key_file out to serve without keys")
    for key in keys:
        if not key.isprintable() or " " in key or len(key) > MAX_KEY_CHARS:
            raise UserError(f"a key in {path} has spaces, control characters or more than {MAX_KEY_CHARS} characters")
    return keys


class Keys:
    """The keys there are. Invariant: they are kept as digests alone."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: str) -> str | None:
        """The tenant that an `Authorization: Bearer` header names; None where its key is none of ours."""
        scheme, _, key = authorization.partition(" ")
        asked, found = _digest(key.strip()), None
        for digest in self._digests:
            if hmac.compare_digest(digest, asked):
                found = digest
        return found.hex()[:16] if found is not None and scheme.lower() == "bearer" else None

    @property
    def tenants(self) -> tuple[str, ...]:
        """A name for each key, which tells nothing of it."""
        return tuple(digest.hex()[:16] for digest in self._digests)


class RequireKey:
    """Answers 401 to whatever needs a key and brings none; `scope["state"]["tenant"]` says whose key it was."""

    def __init__(self, app: ASGIApp, keys: Keys, open_metrics: bool):
        self._app, self._keys, self._open_metrics = app, keys, open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or needs_no_key(scope["path"], self._open_metrics):
            await self._app(scope, receive, send)
            return
        tenant = self._keys.find(Headers(scope=scope).get("authorization", ""))
        if tenant is None:
            answer = ApiError(
                "invalid_api_key",
                "a key of this server is needed, as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await answer.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


def needs_no_key(path: str, open_metrics: bool) -> bool:
    """Whether a path is one of the few that anybody may ask for."""
    is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
    return is_open or (open_metrics and path in METRICS_PATHS)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
