"""What a request may ask of the form of its text, in vLLM's names, and how large the question may be.

Knows no grammar engine and no tokenizer. The one idea: what is too large is refused before anything reads it, by bytes
and counts that cost nothing to see.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, no_type_check

from fastgpt_jax.errors import UserError

MAX_SCHEMA_BYTES = 65_536
MAX_REGEX_LEN = 4_096
MAX_GRAMMAR_BYTES = 65_536
MAX_CHOICES = 1_024
MAX_CHOICES_BYTES = 65_536
MAX_DEPTH = 64
"""Nested schemas of a JSON schema; nested brackets of a regular expression or a grammar."""

MAX_MERGED_PATTERNS = 8
"""Patterns that one string may have to match at once: the engine's work doubles with each; 20 took 4 s, 24 minutes."""

KINDS = ("json", "json_object", "regex", "choice", "grammar")


@no_type_check  # a wrong type is the user's mistake, and answered as one below, not by the test suite's type checks
@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that a text must have: exactly one of five.

    Invariants: exactly one of the five is given; `json` is the text of a schema, `choice` a tuple.

    Attributes:
      json: A JSON schema, as a mapping or as its text.
      json_object: True: any JSON object.
      regex: A regular expression that the whole text matches (Rust's syntax: no look-around, no back-references).
      choice: Texts, one of which it is.
      grammar: A context-free grammar in llguidance's Lark or in GBNF.
      disable_any_whitespace: JSON with nothing between its parts; otherwise a space, or a new line and its indent, may
        stand wherever JSON takes white space.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self):
        given = [name for name in KINDS if getattr(self, name) is not None]
        _require(len(given) == 1, f"structured_outputs needs exactly one of {', '.join(KINDS)}, got {given or 'none'}")
        _require(
            isinstance(self.disable_any_whitespace, bool),
            f"structured_outputs.disable_any_whitespace must be True or False, got {self.disable_any_whitespace!r}",
        )
        object.__setattr__(self, self.kind, _CHECKS[self.kind](getattr(self, self.kind)))
        is_json = self.kind in ("json", "json_object")
        _require(
            is_json or not self.disable_any_whitespace,
            f"structured_outputs.disable_any_whitespace is for JSON, and {self.kind} was given; leave it out",
        )

    @property
    def kind(self) -> str:
        """The one that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)


def as_structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """Returns the parameters that a mapping of keyword arguments stands for, or what was given."""
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise UserError(
            f"structured_outputs must be StructuredOutputsParams or a mapping with one of {', '.join(KINDS)}, "
            f"got {type(value).__name__}"
        )
    known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    for name in value:
        if name not in known:
            raise UserError(f"structured_outputs has no {name!r}; there are {', '.join(known)}")
    return StructuredOutputsParams(**value)


def _checked_json(schema: Any) -> str:
    if not isinstance(schema, str):
        _require(
            isinstance(schema, (Mapping, bool)),
            f"structured_outputs.json must be a JSON schema or its text, got {type(schema).__name__}",
        )
        schema = _dump(schema)
    _check_size("json", _num_bytes(schema), MAX_SCHEMA_BYTES, "bytes")
    return schema


def _checked_json_object(value: Any) -> bool:
    _require(value is True, "structured_outputs.json_object must be True, or left out")
    return value


def _checked_regex(regex: Any) -> str:
    is_text = isinstance(regex, str) and regex != ""
    _require(is_text, f"structured_outputs.regex must be a non-empty string, got {regex!r}")
    _check_size("regex", len(regex), MAX_REGEX_LEN, "characters")
    return regex


def _checked_choice(choice: Any) -> tuple[str, ...]:
    is_list = isinstance(choice, Sequence) and not isinstance(choice, (str, bytes))
    _require(
        is_list and len(choice) > 0 and all(isinstance(text, str) and text for text in choice),
        "structured_outputs.choice must be a list of at least one non-empty string",
    )
    _check_size("choice", len(choice), MAX_CHOICES, "strings")
    _check_size("choice", sum(map(_num_bytes, choice)), MAX_CHOICES_BYTES, "bytes")
    return tuple(choice)


def _checked_grammar(grammar: Any) -> str:
    is_text = isinstance(grammar, str) and grammar.strip() != ""
    _require(is_text, "structured_outputs.grammar must be a string that holds a grammar")
    _check_size("grammar", _num_bytes(grammar), MAX_GRAMMAR_BYTES, "bytes")
    return grammar


_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "json": _checked_json,
        "json_object": _checked_json_object,
        "regex": _checked_regex,
        "choice": _checked_choice,
        "grammar": _checked_grammar,
    }
)
"""Kind -> its check, which returns the value as it is kept."""


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_size(name: str, size: int, most: int, unit: str) -> None:
    _require(size <= most, f"structured_outputs.{name} may have at most {most} {unit}, got {size}")


def _dump(schema: Any) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"structured_outputs.json is no JSON: {error}") from None
