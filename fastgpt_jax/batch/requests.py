"""A file of requests in OpenAI's batch form: one JSON object a line.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 8}}

Knows no model and no routes. The one idea: a line that is no request is an answer already (why it is none), so that one
bad line of a million stops nobody. A line's number, from 1, is its identity; blank lines have none and no answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt_jax.errors import UserError

MAX_LINE_BYTES = 32 * 2**20
_PIECE_BYTES = 2**20
_FIELDS = ("custom_id", "method", "url", "body")
_URL = re.compile(r"/v1/[A-Za-z0-9_/-]{1,100}")


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One request.

    Attributes:
      number: Of its line, from 1.
      url: Such as `/v1/completions`.
      body: JSON, with numbers that are finite.
    """

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def content(self) -> bytes:
        """The body as bytes of JSON; half of a surrogate pair is written as the escape it came as."""
        return json.dumps(self.body, separators=(",", ":")).encode()


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that is no request.

    Attributes:
      custom_id: Its own, where it can be read.
      reason: What a line must hold, and what this one holds.
    """

    number: int
    custom_id: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class InputFacts:
    """What an input is, to tell it from another.

    Attributes:
      num_lines: Lines that hold something.
      last_number: The number of the last line.
      sha256: Of the whole file.
    """

    num_lines: int
    last_number: int
    sha256: str


def survey(path: Path) -> InputFacts:
    """Reads a file once; memory does not grow with it.

    Raises:
      UserError: It cannot be read, or holds nothing.
    """
    digest, num_lines, number, is_blank, ends_open = hashlib.sha256(), 0, 0, True, False
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                lines = piece.split(b"\n")
                for line in lines[:-1]:
                    number += 1
                    num_lines += not (is_blank and _is_blank(line))
                    is_blank = True
                is_blank = is_blank and _is_blank(lines[-1])
                ends_open = bool(lines[-1]) or (ends_open and len(lines) == 1)
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror or error}") from error
    number, num_lines = number + ends_open, num_lines + (not is_blank)
    if not num_lines:
        raise UserError(f"--input {path} holds no request; it takes one JSON object a line")
    return InputFacts(num_lines, number, digest.hexdigest())


def read_requests(path: Path) -> Iterator[BatchRequest | BadLine]:
    """The requests of a file, in order; memory does not grow with the file."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_PIECE_BYTES)
                yield BadLine(number, None, f"a line must have at most {MAX_LINE_BYTES >> 20} MiB")
            elif not _is_blank(line):
                yield parse_line(number, line)


def parse_line(number: int, line: bytes) -> BatchRequest | BadLine:
    """One line as a request, or why it is none."""
    try:
        found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return BadLine(number, None, f"a line must be one JSON object: {error}")
    if not isinstance(found, dict):
        return BadLine(number, None, f"a line must be one JSON object, got a {type(found).__name__}")
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, f"custom_id must be a string that is not empty, got {custom_id!r}")
    unknown = sorted(found.keys() - set(_FIELDS))
    if unknown:
        return BadLine(number, custom_id, f"unknown field {unknown[0]!r}; a request has {', '.join(_FIELDS)}")
    if found.get("method") != "POST":
        return BadLine(number, custom_id, f"method must be 'POST', got {found.get('method')!r}")
    url, body = found.get("url"), found.get("body")
    if not isinstance(url, str) or not _URL.fullmatch(url):
        return BadLine(number, custom_id, f"url must be such as '/v1/completions', got {url!r}")
    if not isinstance(body, dict):
        return BadLine(number, custom_id, f"body must be a JSON object, got a {type(body).__name__}")
    if body.get("stream"):
        return BadLine(number, custom_id, "a batch answers whole; leave out stream")
    return BatchRequest(number, custom_id, url, body)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_blank(line: bytes) -> bool:
    return not line.strip()
