"""Everything about a server that its operator decides: addresses, keys, limits, times.

Knows no engine and no HTTP library. The one idea: a frozen dataclass, checked when it is made, so that nothing behind
it meets a limit that makes no sense; sizes are bytes and times are seconds.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_params import MAX_SCHEMA_BYTES

LOG_FORMATS = ("json", "text")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How to serve.

    Attributes:
      served_model_names: What requests call the model; the first is what answers call it.
      host, port: Where to listen; port 0 takes a free one.
      control_port: Where this machine alone may drain and profile the server; None for nowhere.
      profile_folder: Where profiles are written; None takes none.
      api_keys: Keys that open the routes; none leaves them open.
      open_metrics: Whether `/metrics` and `/openapi.json` need no key.
      cors_allow_origins: Web pages of these origins may call the server; `*` is all of them.
      ssl_certfile, ssl_keyfile: Certificate and its key, for TLS.

      max_body_bytes, max_header_bytes: Most a request may send.
      max_prompts: Most prompts a request, or inputs of an embedding.
      max_n: Most continuations of a prompt.
      max_sequences: Most prompts times continuations of a request.
      max_stop_strings, max_stop_chars: Most stop strings, and most characters of each.
      max_logit_bias: Most entries of `logit_bias`.
      max_messages: Most messages of a chat.
      max_json_depth: Deepest nesting of a body.
      max_schema_bytes: Largest JSON schema, regular expression or grammar; 64 KiB is all that is ever read.
      max_request_id_chars: Longest request id that a client may choose.

      max_queue_len: Sequences that may wait while `max_num_seqs` others run; one more is refused with 429.
      max_queued_tokens: Prompt tokens that may wait for their first answer.

      request_timeout_s: A request that takes longer ends with 504; None sets no end.
      body_timeout_s: A body must be there after this.
      grammar_timeout_s: A schema, regular expression or grammar must be compiled after this.
      keep_alive_timeout_s: An idle connection is closed after this.
      shutdown_timeout_s: Requests under way may take so long after SIGTERM.

      result_cache_ttl_s: Answers to deterministic requests are kept so long; 0 keeps none.
      result_cache_bytes: Most that kept answers may take.

      log_format, log_level: One line a request, as JSON or as text; nothing below the level.
    """

    served_model_names: tuple[str, ...] = ("model",)
    host: str = "127.0.0.1"
    port: int = 8000
    control_port: int | None = None
    profile_folder: Path | None = None
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    open_metrics: bool = False
    cors_allow_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_prompts: int = 256
    max_n: int = 16
    max_sequences: int = 256
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_logit_bias: int = 300
    max_messages: int = 1024
    max_json_depth: int = 64
    max_schema_bytes: int = MAX_SCHEMA_BYTES
    max_request_id_chars: int = 128

    max_queue_len: int = 256
    max_queued_tokens: int = 2**20

    request_timeout_s: float | None = None
    body_timeout_s: float = 30.0
    grammar_timeout_s: float = 5.0
    keep_alive_timeout_s: float = 5.0
    shutdown_timeout_s: float = 30.0

    result_cache_ttl_s: float = 0.0
    result_cache_bytes: int = 64 * 2**20

    log_format: str = "json"
    log_level: str = "info"

    def __post_init__(self):
        if not self.served_model_names or not all(self.served_model_names):
            raise UserError("served_model_name must name the model, got nothing")
        _check_range("port", self.port, 0, 65535)
        if self.control_port is not None:
            _check_range("control_port", self.control_port, 0, 65535)
        elif self.profile_folder is not None:
            raise UserError("profile_folder needs control_port, whose routes take profiles")
        for name in ("max_queue_len", "result_cache_bytes"):
            _check_range(name, getattr(self, name), 0)
        for name in _COUNTS:
            _check_range(name, getattr(self, name), 1)
        _check_range("max_schema_bytes", self.max_schema_bytes, 1, MAX_SCHEMA_BYTES)
        for name in _SECONDS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a finite number of seconds above 0, got {value!r}")
        for name in ("result_cache_ttl_s", "shutdown_timeout_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a finite number of seconds of at least 0, got {value!r}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise UserError("ssl_certfile and ssl_keyfile go together; give both, or neither")
        for name, known in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.served_model_names[0]


_COUNTS = (
    "max_body_bytes",
    "max_header_bytes",
    "max_prompts",
    "max_n",
    "max_sequences",
    "max_stop_strings",
    "max_stop_chars",
    "max_logit_bias",
    "max_messages",
    "max_json_depth",
    "max_request_id_chars",
    "max_queued_tokens",
)
_SECONDS = ("request_timeout_s", "body_timeout_s", "grammar_timeout_s", "keep_alive_timeout_s")


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} must be {allowed}, got {value!r}")
