"""docs/derivation.md knows every model of the zoo, and speaks of no machine's folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.derivation_table import BEGIN, END, PAGE, ROOT, Refused, Served, replace_table, table
from tests.compiler import zoo


def rows_of(page: str) -> dict[str, str]:
    """The second column of each row of the tables, by model."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return {name: second for name, second, *_ in cells}


def test_the_page_lists_every_model_as_served_or_refused():
    rows = rows_of(PAGE.read_text())
    for model in zoo.SERVED:
        assert rows[model.name].isdigit(), f"{model.name}: run `python -m benchmarks.derivation_table`"
    for model in zoo.REFUSED:
        assert model.reason is not None and model.reason.lower() in rows[model.name].lower()
    assert all(model.name in rows for model in zoo.OPTIONAL)


def test_the_page_names_files_relative_to_the_checkout():
    page = PAGE.read_text()
    assert "tests/compiler/zoo/refused.py:" in page
    assert str(ROOT) not in page and str(Path.home()) not in page


def test_replacing_the_table_keeps_the_text_around_it():
    served = Served("a", 1, "2 kv x 3 layers", 4, 0, 0.1, 0.2, 0.3, 0.9, 1000, 1e-7)
    lines = list(table([served, Refused("b", "add at f.py:1: x | y")]))
    page = replace_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", lines)
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert rows_of(page)["a"] == "1" and "0.90 + 1,000 expanding" in page and r"x \| y" in page
    assert replace_table(page, lines) == page
    with pytest.raises(ValueError, match="needs the lines"):
        replace_table("no markers", lines)
