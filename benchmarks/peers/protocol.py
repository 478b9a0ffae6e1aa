"""One engine in a process of its own environment that keeps its model loaded: a line of JSON in, a line of JSON out.

Knows no engine. The one idea: the processes of all engines live side by side and only the one that was asked computes,
so that the parent can let them take turns within seconds and whatever slows the machine slows all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class EngineFailed(Exception):
    """An engine could not do what it was asked, ended, or took longer than it may."""


class Worker:
    """The parent's end of one process."""

    def __init__(self, python: Path, engine: str, settings: Mapping[str, Any], *, threads: int, timeout_s: float):
        """Starts the process, which loads its model at once; `wait_until_ready` gives what it says of itself.

        Args:
          python: The interpreter of the engine's environment.
          settings: What the engine is made with; `env` in it are environment variables.
          timeout_s: How long one answer may take, that of loading included.
        """
        self.engine, self.settings, self._timeout_s = engine, dict(settings), timeout_s
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT)} | dict(settings.get("env", {}))
        self.started = time.monotonic()
        arguments = json.dumps({**settings, "threads": threads, "started": self.started})
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", engine, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not settings.get("is_loud") else None,
            cwd=ROOT,
            env=environment,
        )
        self._input: Any = self._process.stdin
        self._output: Any = self._process.stdout
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> dict[str, Any]:
        """What the engine says of itself once its model is loaded: versions, flags, settings, seconds."""
        return self._answer("load")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Has the engine do something; its answer.

        Raises:
          EngineFailed: It says why it cannot, or it is gone, or out of time; the last two end the process.
        """
        if self._input.closed:
            raise self._gone(command)
        try:
            self._input.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            raise self._gone(command) from None
        return self._answer(command)

    def close(self) -> None:
        """Ends the process; more than once is fine."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with contextlib.suppress(BrokenPipeError):  # what could not be sent any more
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, command: str) -> dict[str, Any]:
        line = self._read_line(command)
        try:
            answer = json.loads(line)
        except ValueError:
            raise EngineFailed(f"{self.engine}: {command} was answered by {line[:200]!r}, which is no JSON") from None
        if "error" in answer:
            raise EngineFailed(f"{self.engine}: {command}: {answer['error']}")
        return answer

    def _read_line(self, command: str) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(deadline - time.monotonic()):
                    self.close()
                    raise EngineFailed(f"{self.engine}: {command} took longer than {self._timeout_s:.0f} s")
                piece = os.read(self._output.fileno(), 65536)
                if not piece:
                    raise self._gone(command)
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _gone(self, command: str) -> EngineFailed:
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # its pipe is closed; its exit code may come a moment later
            self._process.wait(5)
        self.close()
        return EngineFailed(f"{self.engine}: the process ended with code {self._process.returncode} during {command}")
