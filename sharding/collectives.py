"""Counts the collectives of a compiled program: what its devices exchange.

The one idea: XLA decides what is exchanged, so the compiled module is asked, not the program that was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# `%x = f32[2,8]{1,0} all-reduce(...)`, or of a tuple of arrays, or the first half of an asynchronous pair.
_CALL = re.compile(rf"^\s*(?:ROOT )?\S+ = (?:\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE)


def count_collectives(compiled: Any) -> Mapping[str, int]:
    """How often each kind of collective stands in a compiled program (`jit(f).lower(...).compile()`); kinds found only.

    A collective in the body of a loop counts once.
    """
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for call in _CALL.finditer(compiled.as_text()):
        counts[call["kind"]] += 1
    return {kind: count for kind, count in counts.items() if count}
