"""What a request asks of its text, as one grammar in the Lark of llguidance.

Knows no tokenizer. The one idea: all five kinds become a grammar, so that what follows knows one thing alone. Tokens
are never forced: any tokens that spell an allowed text are allowed, and which of them come is the model's choice.
"""

from __future__ import annotations

import json
import re

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_params import MAX_MERGED_PATTERNS, StructuredOutputsParams
from fastgpt_jax.sampling.structured_regex import check_nesting
from fastgpt_jax.sampling.structured_schema import prepare_schema

_HEADER = '%llguidance {"no_forcing": true}\n'
_WHITESPACE = r"( |\r?\n( {0,32}|\t{0,8}))"
"""One space, or a new line and what indents it: a model that likes white space best cannot go on with it for ever."""
_JSON_ESCAPES = 'nrbtf\\"'
"""No `\\u` and no `\\/`: each character has one spelling, so that no name of a property has a second one."""

_MARGIN = r"^[^\S\n]*"
"""Up to the first letter of a line, and no further: `\\s*` would search a run of blank lines once for each of them."""
_UNSUPPORTED = re.compile(
    rf"%json\b|%llguidance\b|\btemperature\s*=|\bmax_tokens\s*=|{_MARGIN}@|:[^\S\n]*@", re.MULTILINE
)
_LARK = re.compile(rf"{_MARGIN}start\s*:", re.MULTILINE)


def make_grammar(params: StructuredOutputsParams) -> str:
    """Returns the grammar; raises UserError for what cannot be enforced."""
    if params.kind in ("json", "json_object"):
        return _HEADER + "start: %json " + _json_schema(params)
    if params.regex is not None:
        return _HEADER + f"start: {_regex(params.regex)}"
    if params.choice is not None:
        # A terminal is one expression of the lexer, where a rule would be an alternative each for the parser.
        return _HEADER + "start: CHOICE\nCHOICE: " + " | ".join(_literal(text) for text in params.choice)
    return _HEADER + _lark(params.grammar or "")


def _json_schema(params: StructuredOutputsParams) -> str:
    schema = {"type": "object"} if params.json is None else prepare_schema(str(params.json))
    if schema is False:
        raise UserError("structured_outputs.json is false: no text satisfies it")
    options: dict[str, object] = {"json_allowed_escapes": _JSON_ESCAPES}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = _WHITESPACE
    return json.dumps({**({} if schema is True else schema), "x-guidance": options})


def _regex(regex: str) -> str:
    from llguidance import regex_to_lark  # noqa: PLC0415 - an optional extra

    check_nesting(regex, "structured_outputs.regex")
    return f"/{regex_to_lark(regex, '')}/"


def _literal(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"structured_outputs.choice must be valid Unicode, got {ascii(text)[:80]}") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark  # noqa: PLC0415 - an optional extra

    check_nesting(text, "structured_outputs.grammar")
    found = _UNSUPPORTED.search(text)
    if found:
        name = found.group().strip(":=").strip()
        raise UserError(
            f"structured_outputs.grammar uses {name!r}, which is not supported in a grammar; a JSON schema goes into "
            "structured_outputs.json"
        )
    if text.count("&") > MAX_MERGED_PATTERNS:
        raise UserError(f"structured_outputs.grammar may join at most {MAX_MERGED_PATTERNS} expressions by &")
    try:
        return text if _LARK.search(text) else gbnf_to_lark(text)
    except Exception as error:  # the converter raises whatever it meets
        raise UserError(f"structured_outputs.grammar is neither Lark nor GBNF: {error}") from None
