"""docs/models.md lists every golden under its family, and every family of the registry."""

from benchmarks.derivation_table import BEGIN, END, replace_table
from benchmarks.parity_table import ABOUT, PAGE, Compared, architectures_of, goldens_of, table
from fastgpt_jax.checkpoint.registry import FAMILIES
from tests.parity.goldens import GOLDENS


def test_the_page_is_what_the_script_writes_for_the_errors_it_shows():
    page = PAGE.read_text()
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[-2] for line in lines[4:]}
    errors = {family: float(rows[about.title]) for family, about in ABOUT.items()}
    compared = [
        Compared(family, architectures_of(family), dict.fromkeys((path.stem for path in goldens_of(family)), error))
        for family, error in errors.items()
    ]
    ours = lines[0].partition("ours computed by ")[2].removesuffix(", in float32.")
    written = replace_table(page, table(compared, ours))
    assert written == page, "run `python -m benchmarks.parity_table`"
    assert max(errors.values()) < 1e-4


def test_every_golden_and_every_architecture_is_on_the_page():
    assert sorted(path for family in ABOUT for path in goldens_of(family)) == sorted(GOLDENS)
    shown = {name for family in ABOUT for name in architectures_of(family)}
    assert shown == {name for family in FAMILIES for name in family.architectures}
