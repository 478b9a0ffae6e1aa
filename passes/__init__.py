"""Rewrites graphs: capture a function, pass over its graph, hand back a function. Knows no model, kernel or mesh."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.transform import apply as apply

_LAZY = {"apply": "passes.transform"}  # lazy, so that leaves such as `passes.ops` load without the pass manager

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'passes' has no attribute {name!r}")
