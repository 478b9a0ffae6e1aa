"""From a conversation to token ids, so that nobody can forge a special token by spelling it.

Knows no model. The one idea: a template's text mixes the template's own special tokens with what people wrote, and a
tokenizer cannot tell them apart. So what people wrote is given to the template with a mark inside every special token
that it spells, or begins to spell; in the template's text only what the template wrote can then be one. Where the mark
turns up, or where the tokenizer finds a special token that the text does not have, special tokens are set one by one
and all between them is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode keeps out of texts for good."""
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "self"})


def encode_chat(
    template: ChatTemplate,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """The prompt of a conversation, as text and as ids.

    Args:
      messages: Each with `role`, which is trusted, and texts, which are not.
      variables: Of the template; not trusted either.

    Raises:
      UserError: The template refuses the conversation or fails on it.
    """
    given = dict(variables or {})
    if not _RESERVED.isdisjoint(given):
        raise UserError(f"variables of a chat template must not be named {', '.join(sorted(_RESERVED & set(given)))}")
    special = getattr(tokenizer, "special_tokens", {})
    if not special:
        text = template.render(messages, add_generation_prompt=add_generation_prompt, **given)
        encoded = tokenizer.encode(text)
        return text, list(getattr(encoded, "ids", encoded))
    guard = _Guard(special, [*messages, given])
    guarded = [
        {name: value if name == "role" else guard.mark_all(value) for name, value in message.items()}
        for message in messages
    ]
    text = template.render(guarded, add_generation_prompt=add_generation_prompt, **guard.mark_all(given))
    return guard.encode(text, tokenizer)


class _Guard:
    """Marks special tokens that people spelled, and encodes a text so that these stay text."""

    def __init__(self, special: Mapping[str, int], values: Any):
        self._special = special
        self._mark = _unused_mark(values)
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        # A template may change upper and lower case, and may join texts, with or without the space at their ends.
        self._spellings = {spelling.encode().lower(): len(spelling[0].encode()) for spelling in special}
        self._beginnings = {
            spelling[:length]: offset
            for spelling, offset in self._spellings.items()
            for length in range(offset, len(spelling))
        }
        self._longest = max(map(len, self._spellings))

    def mark_all(self, value: Any) -> Any:
        """A value with the special tokens in all of its texts marked."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark_all(name): self.mark_all(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(inner) for inner in value]
        return value

    def encode(self, text: str, tokenizer: Any) -> tuple[str, list[int]]:
        """The text without marks, and its ids: special tokens of the template alone are special tokens."""
        pieces = self._split.split(text)
        plain = text.replace(self._mark, "")
        if plain == text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            known = set(self._special.values()) - {tokenizer.unknown_token_id}
            written = [self._special[piece] for piece in pieces[1::2]]
            if [i for i in ids if i in known] == [i for i in written if i in known]:
                return text, ids
        ids = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._special[piece])
            else:
                words = piece.replace(self._mark, "")
                ids += tokenizer.encode(words, add_special_tokens=False, parse_special=False)
        return plain, ids

    def _mark_text(self, text: str) -> str:
        """The text with a mark after the first letter of each special token, and of a beginning of one at its end."""
        raw = text.encode("utf-8", "surrogatepass")
        lowered = raw.lower()
        marks = set()
        for spelling, offset in self._spellings.items():
            place = lowered.find(spelling)
            while place >= 0:
                marks.add(place + offset)
                place = lowered.find(spelling, place + 1)
        end = lowered.rstrip()
        for length in range(1, min(self._longest, len(end)) + 1):
            offset = self._beginnings.get(end[-length:])
            if offset is not None:
                marks.add(len(end) - length + offset)
        if not marks:
            return text
        places = [0, *sorted(marks), len(raw)]
        parts = [raw[start:stop] for start, stop in zip(places, places[1:], strict=False)]
        return self._mark.encode().join(parts).decode("utf-8", "surrogatepass")


def _unused_mark(values: Any) -> str:
    """A character that occurs in none of the texts."""
    found = "".join(_texts(values))
    mark = next((mark for mark in _MARKS if mark not in found), None)
    if mark is None:
        raise UserError("the messages hold all of the characters that Unicode keeps out of texts")
    return mark


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(name)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
