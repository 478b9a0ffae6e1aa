"""SHA-256 of files in pieces of 64 MiB, so that large files are hashed by several threads while they are paged in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 64 * 2**20


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> tuple[str, ...]:
    """A digest for each piece of a file; one for an empty file."""
    return next(iter(digest_files([path])))


def digest_files(paths: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """The digests of each file, in order; pieces of all files share the threads."""
    pieces = [(path, start) for path in paths for start in range(0, max(path.stat().st_size, 1), PIECE_BYTES)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        digests = pool.map(lambda piece: _digest_piece(*piece), pieces)
        yield from _by_file(paths, pieces, digests)


class PieceDigester:
    """Digests a stream while it is written."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._hash, self._num_bytes = hashlib.sha256(), 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes."""
        while len(data):
            taken = data[: PIECE_BYTES - self._num_bytes]
            self._hash.update(taken)
            self._num_bytes += len(taken)
            data = data[len(taken) :]
            if self._num_bytes == PIECE_BYTES:
                self._done.append(self._hash.hexdigest())
                self._hash, self._num_bytes = hashlib.sha256(), 0

    def digests(self) -> tuple[str, ...]:
        """The digests of what was taken, as `digest_file` would give them."""
        return (*self._done, self._hash.hexdigest()) if self._num_bytes or not self._done else tuple(self._done)


def _digest_piece(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), PIECE_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (data := file.read(min(left, 2**20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _by_file(
    paths: Sequence[Path], pieces: Sequence[tuple[Path, int]], digests: Iterable[str]
) -> Iterator[tuple[str, ...]]:
    found: dict[Path, list[str]] = {path: [] for path in paths}
    for (path, _), digest in zip(pieces, digests, strict=True):
        found[path].append(digest)
    yield from (tuple(found[path]) for path in paths)
