"""docs/architecture.md lists every module, with the sentence it begins with."""

from benchmarks.module_table import HEADING, PAGE, missing_packages, table


def test_the_page_lists_the_modules_there_are():
    assert missing_packages() == []
    assert PAGE.read_text(encoding="utf-8").partition(HEADING)[2] == table(), "run: python -m benchmarks.module_table"
