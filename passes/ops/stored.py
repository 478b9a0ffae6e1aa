"""`stored`: marks a value that is kept as it is made, wherever the cut between `prepare` and `step` would rather lie.

Meaning: the value itself. `passes.binding_time` never makes it again in `step`, so that a quantization is not undone
where the float weight is smaller, or is read by somebody else too. FLOPs: 0. Bytes: none of its own.
"""

from __future__ import annotations

from typing import Any

from passes import compat


def stored(x: Any) -> Any:
    """Returns `x`, to be kept."""
    (out,) = stored_p.bind(x)
    return out


def _meaning(x: Any) -> list[Any]:
    return [x]


def _abstract(x: Any) -> list[Any]:
    return [compat.shaped(x.shape, x.dtype)]


stored_p = compat.derive_rules(compat.make_primitive("stored", _meaning, _abstract))
