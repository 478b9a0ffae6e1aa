"""The patterns of JSON Schema (ECMA-262) in the syntax of the grammar engine (Rust's), where the two differ.

Knows no schema. The one idea: both read almost the same language, so only what means something else is spelled out
again, and what cannot be is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_params import MAX_DEPTH, MAX_REGEX_LEN

_SPACE = r"\t\n\x0B\x0C\r\x20\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
_NO_SPACE = (
    r"\x00-\x08\x0E-\x1F\x21-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027}\x{202A}-\x{202E}"
    r"\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{FEFE}\x{FF00}-\x{10FFFF}"
)
_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "s": _SPACE,
        "S": _NO_SPACE,
        "d": "0-9",
        "D": r"\x00-\x2F\x3A-\x{10FFFF}",
        "w": "0-9A-Za-z_",
        "W": r"\x00-\x2F\x3A-\x40\x5B-\x5E\x60\x7B-\x{10FFFF}",
    }
)
"""ECMA-262's classes as ranges; its white space has U+FEFF, its digits and letters are ASCII."""

_ANY = r"[^\n\r\x{2028}\x{2029}]"
_SAME_ESCAPES = frozenset("tnrvf^$\\.*+?()[]{}|/-")
_TOKEN = re.compile(
    r"\\u\{[0-9A-Fa-f]{1,6}\}|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|\\[pP]\{[A-Za-z_=]+\}|\\.|.", re.DOTALL
)


def translate_pattern(pattern: str, where: str) -> str:
    """Returns an ECMA-262 pattern in Rust's syntax; raises UserError, naming `where`, for what has no translation."""
    check_nesting(pattern, where)
    if len(pattern) > MAX_REGEX_LEN:
        raise UserError(f"{where} may have at most {MAX_REGEX_LEN} characters, got {len(pattern)}")
    pieces: list[str] = []
    in_class = False
    tokens = _TOKEN.findall(pattern)
    for index, token in enumerate(tokens):
        if _is_control(token) and not (in_class and _begins_range(tokens[index + 1 : index + 3])):
            raise UserError(f"{where} holds the control character {ascii(token)}, which is never generated")
        if token.startswith("\\"):
            pieces.append(_escape(token, in_class, where))
        elif in_class:
            is_set_operation = token in "&~" and tokens[index + 1 : index + 2] == [token]
            in_class = token != "]"
            # A bracket, and an operation on sets, mean themselves within a class of ECMA-262's.
            pieces.append("\\[" if token == "[" else "\\" + token if is_set_operation else token)
        else:
            in_class = token == "["
            pieces.append(_ANY if token == "." else token)
            if token == "(" and tokens[index + 1 : index + 2] == ["?"] and tokens[index + 2 : index + 3] != [":"]:
                _check_group("".join(tokens[index + 2 : index + 4]), where)
    return "".join(pieces)


def check_nesting(text: str, where: str) -> None:
    """Raises UserError where brackets nest deeper than `MAX_DEPTH`, whether or not they are quoted."""
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > MAX_DEPTH:
            raise UserError(f"{where} nests brackets deeper than {MAX_DEPTH}; make it flatter")


def _is_control(token: str) -> bool:
    """Whether this is a control character that JSON spells by number alone."""
    code = _code(token)
    return code is not None and (code < 0x08 or code == 0x0B or 0x0E <= code < 0x20 or code == 0x7F)


def _begins_range(following: list[str]) -> bool:
    """Whether what comes before is the lower end of a range that reaches past the control characters."""
    end = _code(following[1]) if len(following) == 2 and following[0] == "-" else None
    return end is not None and end >= 0x20 and end != 0x7F


def _code(token: str) -> int | None:
    """The one character that a token stands for; None where it stands for none, or for several."""
    if len(token) == 1:
        return ord(token)
    if token[1] in "ux" and len(token) > 2:
        return int(token[2:].strip("{}"), 16)
    return {"0": 0x00, "v": 0x0B}.get(token[1:])


def _escape(token: str, in_class: bool, where: str) -> str:
    letter = token[1:2]
    if letter in _CLASSES and len(token) == 2:
        return _CLASSES[letter] if in_class else f"[{_CLASSES[letter]}]"
    if letter in ("u", "x") and len(token) > 2:
        code = _code(token)
        if code is None or 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
            raise UserError(f"{where} names a surrogate or no character at all: {token}")
        return f"\\x{{{code:X}}}"
    if letter in ("p", "P") and len(token) > 2:
        return token
    if letter == "0" and len(token) == 2:
        return "\\x00"
    if letter in _SAME_ESCAPES:
        return token
    raise UserError(f"{where} uses {token}, which is not supported in a pattern")


def _check_group(opening: str, where: str) -> None:
    """A named group is a group; everything else behind `(?` looks around, or is no ECMA-262."""
    if not opening.startswith("<") or opening[1:2] in ("=", "!", ""):
        raise UserError(f"{where} uses (?{opening[:1]}, and look-around and flags are not supported in a pattern")
