"""Aligned plain text: tables, and numbers with their unit as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"|-|[+-]?\d+(\.\d+)?( ?[A-Za-z%]+)?")


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, indent: str = "") -> str:
    """Lines of columns two spaces apart; a column whose cells are all numbers is set to the right.

    Args:
      rows: Cells, the same number in each row.
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    columns = list(zip(*lines, strict=True))
    set_cells = []
    for cells in columns:
        width = max(map(len, cells))
        is_right = all(_is_number(cell) for cell in cells[bool(header) :])
        set_cells.append([cell.rjust(width) if is_right else cell.ljust(width) for cell in cells])
    return "\n".join((indent + "  ".join(row)).rstrip() for row in zip(*set_cells, strict=True))


def format_bytes(num_bytes: float) -> str:
    """Such as `7 B`, `1.2 KiB` and `2.05 GiB`."""
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_count(count: float) -> str:
    """Such as `7`, `1.25 K` and `2.05 G`, in powers of a thousand."""
    return _scaled(count, 1000, ("", "K", "M", "G", "T", "P")).rstrip()


def format_seconds(seconds: float) -> str:
    """Such as `0.31 s` and `2 min 5 s`."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if seconds >= 99.5 else f"{seconds:.3g} s"


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    index = 0
    while abs(number) >= 0.9995 * base and index < len(units) - 1:
        number, index = number / base, index + 1
    return f"{number:.0f} {units[0]}" if index == 0 else f"{number:.4g} {units[index]}"


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None
