"""What every route needs: the model, the settings, and what follows from them once."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_vocabulary import token_bytes
from fastgpt_jax.serving.auth import Keys
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.settings import ServerSettings
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

OWNER = "fastgpt-jax"
RETRY = {"Retry-After": "1"}


@dataclasses.dataclass(frozen=True)
class Server:
    """One served model.

    Attributes:
      llm: An `AsyncLLM`, or what stands before one.
      template: Makes prompts of conversations; None where the model has none.
      fingerprint: Of the compiled program, for `system_fingerprint`; None where it has none.
      created: When the server began to serve, in seconds since 1970.
    """

    llm: Any
    settings: ServerSettings
    keys: Keys
    template: ChatTemplate | None
    fingerprint: str | None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _token_bytes: dict[str, Sequence[bytes] | None] = dataclasses.field(default_factory=dict)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served here; a request that names none means the one there is."""
        if name is not None and name not in self.settings.served_model_names:
            names = ", ".join(self.settings.served_model_names)
            raise ApiError("model_not_found", f"there is no model {ascii(name)[:80]}; this server has {names}", "model")

    def check_ready(self) -> None:
        """Raises ApiError while nothing new is taken."""
        if self.llm.is_draining:
            raise ApiError("draining", "the server is shutting down; send the request elsewhere", headers=RETRY)
        if not self.llm.is_ready:
            raise ApiError("not_ready", "the server is not ready; ask /health/ready when it is", headers=RETRY)

    def cache_salt(self, request: Request, salt: str) -> str:
        """Parts what is cached by tenant, where there are several, and by what the request says."""
        tenant = getattr(request.state, "tenant", "") if len(self.keys.tenants) > 1 else ""
        return f"{tenant}/{salt}" if tenant else salt

    @property
    def fingerprint_field(self) -> dict[str, str]:
        """`system_fingerprint`, where there is one."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}

    async def token_bytes(self) -> Sequence[bytes] | None:
        """What each token adds to a text, read from the vocabulary once; None where the tokenizer does not tell."""
        if "table" not in self._token_bytes:
            try:
                table = await asyncio.to_thread(token_bytes, self.llm.tokenizer, self.llm.vocab_size)
            except UserError:
                table = None
            self._token_bytes["table"] = table
        return self._token_bytes["table"]

    def deadline_s(self, asked: float | None) -> float | None:
        """The earlier of the server's end and the request's own."""
        given = [limit for limit in (asked, self.settings.request_timeout_s) if limit is not None]
        return min(given, default=None)


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    return request.app.state.server


def new_id(prefix: str) -> str:
    """An id that no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"
