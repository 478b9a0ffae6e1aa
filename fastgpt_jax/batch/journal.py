"""The file of answers, which is also the memory of what has been answered.

The one idea: an answer's line carries the number of its request, and is whole or not there: a line without its end is
cut off when the job goes on. So the file alone says what is left to do, after a kill at any moment, and a bit a request
is all that memory holds. Beside it lies `OUTPUT.job.json`, which says of which input and model these answers are.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fastgpt_jax.errors import UserError

SYNC_INTERVAL_S = 1.0
_PIECE_BYTES = 2**20
_ID = re.compile(rb'\{"id":"batch_req_(\d+)",')


class Journal:
    """Answers, appended one line each; one writer at a time.

    Invariants: a number is in the file at most once; every line but one being written is whole.
    """

    def __init__(self, path: Path, *, identity: Mapping[str, Any], last_number: int):
        """Opens or continues a file of answers.

        Args:
          identity: What answers must agree in to lie in one file, such as the input's digest; JSON values.
          last_number: The highest number of a request.

        Raises:
          UserError: Another process writes it, or it answers something else.
        """
        self.path = path
        self._record = path.with_name(path.name + ".job.json")
        self._is_done = bytearray((last_number >> 3) + 1)
        self.num_done = 0
        self._last_sync = time.monotonic()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write --output {path}: {error.strerror or error}") from error
        try:
            self._lock()
            self._check_identity(dict(identity))
            self._read_done(last_number)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def is_done(self, number: int) -> bool:
        """Whether a request has its answer."""
        return bool(self._is_done[number >> 3] >> (number & 7) & 1)

    def write(self, number: int, answer: Mapping[str, Any]) -> None:
        """Appends a request's answer; on the disk within a second or so, and in the file at once."""
        if self.is_done(number):
            raise RuntimeError(f"request {number} has its answer already")
        line = json.dumps({"id": f"batch_req_{number}", **answer}, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate, which JSON may hold as an escape, has no UTF-8.
        rest = memoryview(line.encode("utf-8", "replace") + b"\n")
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self._mark(number)
        if time.monotonic() - self._last_sync > SYNC_INTERVAL_S:
            os.fdatasync(self._fd)
            self._last_sync = time.monotonic()

    def _mark(self, number: int) -> None:
        self._is_done[number >> 3] |= 1 << (number & 7)
        self.num_done += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another job writes {self.path}; wait for it, or name another --output") from None

    def _check_identity(self, identity: dict[str, Any]) -> None:
        """Compares with what the file was begun for, or writes that down if it is new."""
        try:
            found = json.loads(self._record.read_text("utf-8"))
        except FileNotFoundError:
            if os.fstat(self._fd).st_size:
                raise UserError(
                    f"{self.path} is there already and {self._record.name} is not, so it is no job to go on with; "
                    "name another --output, or remove it"
                ) from None
            self._write_identity(identity)
            return
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self._record}: {error}; remove it and the output to start anew") from None
        other = next((name for name in identity if found.get(name) != identity[name]), None)
        if other is not None:
            raise UserError(
                f"{self.path} was begun with another {other} ({found.get(other)!r}, now {identity[other]!r}); "
                "name another --output, or remove it"
            )

    def _write_identity(self, identity: dict[str, Any]) -> None:
        temporary = self._record.with_name(f"{self._record.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(identity, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._record)

    def _read_done(self, last_number: int) -> None:
        """Marks what is answered, and cuts off a last line that has no end."""
        whole, begin, is_line_start = 0, b"", True
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            while piece := file.readline(_PIECE_BYTES):
                if is_line_start:
                    begin = piece[:64]
                is_line_start = piece.endswith(b"\n")
                if is_line_start:
                    self._mark_line(begin, last_number)
                    whole = file.tell()
        os.ftruncate(self._fd, whole)

    def _mark_line(self, begin: bytes, last_number: int) -> None:
        found = _ID.match(begin)
        number = int(found[1]) if found else 0
        if not 1 <= number <= last_number:
            raise UserError(f"{self.path} holds a line that is no answer of this job; name another --output")
        if not self.is_done(number):
            self._mark(number)
