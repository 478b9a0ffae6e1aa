"""Chat templates: the Jinja programs with which models turn a conversation into a prompt.

Knows no model. The one idea: a template is a stranger's program, so it runs in Jinja's immutable sandbox, with the few
names that Hugging Face transformers gives it, its text and its time have an end, and whatever goes wrong in it is one
line for the user. It works on copies, so that it may use a list as a queue, as some do with their own, and the
caller's stay as they are.
"""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import read_optional_json_object

MAX_CHARS = 2**24
MAX_SECONDS = 10.0


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None):
        """Compiles the template.

        Args:
          source: The Jinja source.
          bos_token: Given to the template as `bos_token`; so is `eos_token`.

        Raises:
          UserError: It is not valid Jinja.
        """
        self._special_tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = _make_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; it already holds its special tokens, so encode it without adding any.

        Args:
          messages: Each with `role` and `content`.
          add_generation_prompt: Whether the prompt ends where the assistant begins to speak.
          tools: JSON schemas of functions that the model may call.
          variables: Further variables of the template.

        Raises:
          UserError: The template refuses the conversation or fails on it.
        """
        try:
            pieces = self._template.generate(
                messages=copy.deepcopy(messages),
                add_generation_prompt=add_generation_prompt,
                tools=copy.deepcopy(tools),
                **self._special_tokens | copy.deepcopy(variables),
            )
            return _join(pieces)
        except _Refused as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # A template's mistake may raise anything at all.
            raise UserError(f"the chat template fails on these messages: {error}") from error


def load_chat_template(folder: str | Path) -> str | None:
    """The source in chat_template.jinja, else in tokenizer_config.json; None where a folder has neither.

    Of several named templates, the one named `default` is taken.
    """
    path = Path(folder)
    source = path / "chat_template.jinja"
    if source.exists():
        try:
            return source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {source}: {error}") from error
    config = read_optional_json_object(path / "tokenizer_config.json")
    template = config.values.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{config.where} must give chat_template as text, got {type(template).__name__}")
    return template


class _Refused(Exception):
    """Raised by a template, through `raise_exception`."""


def _join(pieces: Iterable[str]) -> str:
    """The text of a template as it comes, as long as it is neither too long nor too slow."""
    parts, num_chars, end_s = [], 0, time.monotonic() + MAX_SECONDS
    for piece in pieces:
        parts.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_CHARS:
            raise _Refused(f"the text would have more than {MAX_CHARS} characters")
        if time.monotonic() > end_s:
            raise _Refused(f"the text took more than {MAX_SECONDS:g} s")
    return "".join(parts)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, in which nothing can be changed, but that lists grow and shrink at an end."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (type(obj) is list and attr in ("append", "pop")) or super().is_safe_attribute(obj, attr, value)


def _make_environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands; Jinja's own filter escapes it for HTML. What `map` and `select` yield is an array."""
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys, default=_as_list
    )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")
