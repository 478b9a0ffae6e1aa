"""A folder that appears whole or not at all: everything is written beside it and takes its place by a rename.

What an interrupted writer leaves behind is found again by the next one, which may use what it can check.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from fastgpt_jax.artifact.manifest import MANIFEST, MANIFEST_DIGEST
from fastgpt_jax.errors import UserError


class Staging:
    """The folder being written, `.NAME.partial` beside the output, held by one process at a time.

    Invariant: the output is never there half-written; a reader that has an older one open keeps its files.
    """

    def __init__(self, output: Path):
        """Raises UserError where the output is something else than an artifact, an empty folder or nothing."""
        self.output = output.resolve()  # the folder that a link names, not the link
        if not self.output.name:
            raise UserError(f"{output} cannot be replaced; name a folder in it")
        self.path = self.output.with_name(f".{self.output.name}.partial")
        self._previous = self.output.with_name(f".{self.output.name}.previous")
        self._lock: int | None = None
        if self.output.is_dir() and any(self.output.iterdir()) and not _is_artifact(self.output):
            raise UserError(f"{output} holds files and is no artifact; name another folder, or remove it")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{output} is a file; name a folder for the artifact")

    def __enter__(self) -> Staging:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"another process is writing {self.output}; wait for it, or name another folder") from None
        if self._previous.exists() and not self.output.exists():  # the last writer ended between two renames
            self._previous.rename(self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def publish(self) -> None:
        """Puts the folder in its place, once all of it is on the disk."""
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        shutil.rmtree(self._previous, ignore_errors=True)
        if self.output.exists():
            self.output.rename(self._previous)
        try:
            self.path.rename(self.output)
        except OSError:
            if self._previous.exists():
                self._previous.rename(self.output)
            raise
        _sync(self.output.parent)
        shutil.rmtree(self._previous, ignore_errors=True)


def _is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / MANIFEST_DIGEST).exists()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
