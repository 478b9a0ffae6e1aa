"""Turns a growing list of token ids into text, piece by piece.

Knows no model and no stop strings. The one idea: text is given out once no later token can change it, and then it
depends on nothing but the token before it, so a window that starts at that token is all that is decoded again.

What a later token can still change:
  * the last character, where it shows as U+FFFD: a byte-level token may end within a character;
  * a run of byte tokens (`<0xE2>`) at the end: it is decoded as a whole, and is either valid UTF-8 or all U+FFFD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """One stream. Invariant: what `add` gave out, then `finish`, concatenates to the decoding of all ids added.

    `_window` holds the ids whose text is not settled, behind one settled id for context (a leading space is stripped
    from the first token of a text and from no other); `_num_given` characters of its decoding have been given out.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_shown: Callable[[int], bool],
        byte_token_ids: frozenset[int],
    ):
        """Args:
        decode: Ids to text, all of them shown.
        is_shown: Whether an id has text at all (special tokens may be skipped).
        byte_token_ids: Ids that stand for one byte each and are decoded in runs; empty for byte-level tokenizers.
        """
        self._decode = decode
        self._is_shown = is_shown
        self._byte_token_ids = byte_token_ids
        self._window: list[int] = []
        self._num_context = 0
        self._num_given = 0

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that has become certain."""
        self._window += filter(self._is_shown, ids)
        num_closed = len(self._window)
        while num_closed > self._num_context and self._window[num_closed - 1] in self._byte_token_ids:
            num_closed -= 1
        if num_closed == self._num_context:
            return ""
        text = self._decode(self._window[:num_closed])
        certain = text.removesuffix(_REPLACEMENT)
        given = self._give(certain)
        if certain == text:
            self._settle(num_closed)
        return given

    def finish(self) -> str:
        """Returns the rest of the text; nothing may be added after."""
        return self._give(self._decode(self._window))

    def _give(self, certain: str) -> str:
        given = certain[self._num_given :]
        self._num_given = max(self._num_given, len(certain))
        return given

    def _settle(self, num_closed: int) -> None:
        del self._window[: num_closed - 1]
        self._num_context = 1
        self._num_given = len(self._decode(self._window[:1]))
