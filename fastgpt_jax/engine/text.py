"""The text of one continuation as its tokens arrive: decoding, stop strings, and what may be shown.

Knows no logits and no scheduling. The one idea: text is only ever appended to what was shown; what could still be
swallowed by a stop string, or is an unfinished UTF-8 sequence, waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgpt_jax.engine.stop import StopMatch, find_stop, visible_length
from fastgpt_jax.sampling.params import SamplingParams


class PlainDetokenizer:
    """Incremental decoding for a tokenizer that only knows `decode(ids)`, such as a user's own of a few lines.

    Takes it that the decoding of two lists, one after the other, is that of their concatenation, except within a
    character.
    """

    def __init__(self, tokenizer: Any):
        self._decode = tokenizer.decode
        self._pending: list[int] = []

    def add(self, token_ids: list[int]) -> str:
        """Returns the text that became certain; a trailing replacement character means that bytes are missing."""
        self._pending.extend(token_ids)
        text = self._decode(self._pending)
        if text.endswith("\ufffd"):
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        """Returns what is left, replacement characters included."""
        text = self._decode(self._pending) if self._pending else ""
        self._pending.clear()
        return text


class OutputText:
    """Text generated so far.

    Invariants: `visible` only grows, and is a prefix of the final text; after `match` is set nothing is added.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_token_ids: Sequence[int]):
        self._stops = tuple(params.stop)
        self._includes_stop = params.include_stop_str_in_output
        self._detokenizer = make_detokenizer(tokenizer, params.skip_special_tokens, prompt_token_ids)
        self._text = ""
        self._not_before = 0
        self._is_finished = False
        self.match: StopMatch | None = None

    @property
    def visible(self) -> str:
        """What may be shown now."""
        if self.match is not None:
            return self._text[: self.match.end if self._includes_stop else self.match.start]
        if self._is_finished or self._includes_stop:
            return self._text
        return self._text[: visible_length(self._text, self._stops)]

    def add(self, token_id: int, *, may_stop: bool) -> StopMatch | None:
        """Adds a token's text; returns the stop string it completes, if `may_stop` and it completes one."""
        if self._detokenizer is None:
            return None
        num_seen = len(self._text)
        self._text += self._detokenizer.add([token_id])
        self._search(num_seen, may_stop)
        return self.match

    def finish(self, *, may_stop: bool) -> StopMatch | None:
        """Adds what the detokenizer held back and makes everything visible; that too may complete a stop string."""
        is_open, self._is_finished = not self._is_finished, True
        if self._detokenizer is not None and self.match is None and is_open:
            num_seen = len(self._text)
            self._text += self._detokenizer.finish()
            self._search(num_seen, may_stop)
        return self.match

    def _search(self, num_seen: int, may_stop: bool) -> None:
        if may_stop:
            self.match = find_stop(self._text, self._stops, num_seen, self._not_before)
        else:
            self._not_before = len(self._text)


def make_detokenizer(tokenizer: Any, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> Any:
    """Returns the tokenizer's own incremental detokenizer, or one made of its `decode`; None without a tokenizer.

    The prompt is context: a tokenizer may strip the space before the first token of a text, and no other.
    """
    if tokenizer is None:
        return None
    if hasattr(tokenizer, "detokenizer"):
        return tokenizer.detokenizer(skip_special_tokens=skip_special_tokens, prompt_ids=prompt_token_ids)
    return PlainDetokenizer(tokenizer)
