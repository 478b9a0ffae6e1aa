"""The formats of JSON Schema that can be enforced, as regular expressions where the grammar engine takes too much.

The one idea: a text that is generated must be valid, and need not be every valid text; where a format cannot be said
exactly in a regular expression, the one here says less, never more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_LEAP = r"(?:(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26]))|(?:(?:[02468][048]|[13579][26])00))"
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))|" + _LEAP + r"-02-29)"
)
_OFFSET = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FRACTION = r"(?:\.[0-9]+)?"
_TIME = (
    r"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    + _FRACTION
    + _OFFSET
    + r"|23:59:60"
    + _FRACTION
    # A leap second is the last of a day in UTC.
    + r"(?:[Zz]|[+-]00:00))"
)


def _label(most: int) -> str:
    """A label of a host name, of at most this many characters.

    None has hyphens third and fourth: those are internationalised, and their rules no expression holds.
    """
    end = "[A-Za-z0-9]"
    tail = f"(?:[A-Za-z0-9-]{{0,{most - 5}}}{end})?"
    return f"(?:{end}{{1,2}}|{end}[A-Za-z0-9-]{end}{tail}|{end}[A-Za-z0-9-]-{end}{tail})"


PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "date": f"^{_DATE}$",
        "time": f"^{_TIME}$",
        "date-time": rf"^{_DATE}[Tt]{_TIME}$",
        # A name has at most 253 characters: one label of 62, or seven of 31.
        "hostname": rf"^(?:{_label(62)}|{_label(31)}(?:\.{_label(31)}){{1,6}})$",
    }
)
"""Name -> pattern in Rust's syntax, in place of the engine's own reading."""

EXACT = frozenset({"duration", "email", "ipv4", "ipv6", "uri", "uuid"})
"""Formats that the engine's own reading enforces."""
