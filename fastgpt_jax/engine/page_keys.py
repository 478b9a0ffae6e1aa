"""Names of full pages: a page is called by the digest of all tokens up to its end.

The one idea: a chain of SHA-256, begun by who may share the rows and by whatever else decides them, so that equal names
mean equal rows, and a tenant can neither use nor time the prefixes of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np


def root_key(salts: Sequence[str]) -> bytes:
    """The key before the first page. Texts are framed by their length, so that no two lists run together."""
    digest = hashlib.sha256(b"fastgpt page keys 1\0")
    for salt in salts:
        encoded = salt.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def next_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full page that follows another."""
    return hashlib.sha256(previous + np.asarray(token_ids, "<i8").tobytes()).digest()


class PageKeys:
    """The keys of a growing list of tokens, made as they are asked for."""

    def __init__(self, salts: Sequence[str], page_size: int):
        self._root = root_key(salts)
        self._page_size = page_size
        self._keys: list[bytes] = []

    def up_to(self, num_pages: int, tokens: Callable[[int, int], Sequence[int]]) -> list[bytes]:
        """Returns the keys of the first pages, all of them full; `tokens(start, stop)` gives a stretch of tokens."""
        while len(self._keys) < num_pages:
            start = len(self._keys) * self._page_size
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(next_key(previous, tokens(start, start + self._page_size)))
        return self._keys[:num_pages]
