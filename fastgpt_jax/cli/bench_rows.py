"""What every bench does with its measurements: a table of their spread, and a file that keeps each of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt_jax.cli.tables import format_table


def format_spread(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, what: str = "", digits: int = 2) -> str:
    """A table of the median, the least and the most of some figures over runs."""
    picks = (statistics.median, min, max)
    cells = [(name, *(f"{pick(row[name] for row in rows):.{digits}f}" for pick in picks)) for name in names]
    return format_table(cells, (what, "median", "least", "most"))


def append_jsonl(path: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a line of JSON a run to a file, where one is given."""
    if path is not None:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
