"""`docs/passes.md`: the pass that it writes from scratch works, is short, and does what the page says of it."""

import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.registry import PASSES, PIPELINES
from tests.passes.graphs import assert_same_bits, names, read, run

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
X = jnp.linspace(-2.0, 2.0, 7)


@pytest.fixture(scope="module")
def page() -> dict:
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/passes.md", "exec"), names)  # noqa: S102 - the page is ours
    return names


def merge(page, fn, **options) -> tuple[Graph, list]:
    graph = read(fn, X)
    pipeline = [page["MERGE_FLOORS"], PASSES["dce"]]
    return graph, list(PassManager(pipeline, PassOptions(**options)).run(graph))


def three_floors(x):
    return jnp.maximum(0.5, jnp.maximum(jnp.maximum(x, -1.0), 0.25)) * 2


def test_the_pass_is_shorter_than_forty_lines():
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert 20 < len(code) < 40


def test_it_matches_exactly_and_its_rewrites_are_validated(page):
    graph, (merged, _) = merge(page, three_floors)
    assert merged.result.matched == len(merged.result.rewrites) == 2
    assert [found.status for found in merged.validations] == ["valid", "valid"]
    assert names(graph)["max"] == 1
    assert_same_bits(run(graph, X), run(read(three_floors, X), X))
    again = PassManager([page["MERGE_FLOORS"]]).run(graph)
    assert again[0].result.matched == 0


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.maximum(jnp.minimum(x, 1.0), 0.0),
        lambda x: jnp.maximum(jnp.maximum(x, x * 2), 0.0),
        lambda x: jnp.maximum(jnp.maximum(x, 0.0) * 2, 1.0),
    ],
)
def test_near_misses_do_not_fire(page, fn):
    assert merge(page, fn)[1][0].result.matched == 0


def test_a_value_that_is_read_elsewhere_is_a_miss_with_its_line(page):
    def escapes(x):
        inner = jnp.maximum(x, 0.0)
        return jnp.maximum(inner, 1.0), inner

    (remark,) = merge(page, escapes)[1][0].result.remarks
    assert str(remark).startswith("test_passes_page.py:") and "read elsewhere too" in str(remark)


def test_bisection_stops_between_two_rewrites(page):
    assert merge(page, three_floors, bisect_limit=1)[1][0].result.matched == 1


def test_the_function_that_the_page_makes_works(page):
    np.testing.assert_array_equal(page["clamp"](X), np.maximum(X, 0.5))


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_says_what_it_matches_and_what_it_needs_and_does_to_numbers(name):
    text = " ".join((inspect.getmodule(PASSES[name].function).__doc__ or "").split()).lower()
    assert all(word in text for word in ("matches:", "does not match:", "must run after", "numerics: ")), text
    assert f"numerics: {PASSES[name].numerics.value}" in text


def test_the_table_holds_what_passes_promise():
    """Exact passes change no bit operation by operation, a second run changes nothing, and every rewrite is valid."""
    table = PAGE.partition("<!-- table: begin -->")[2].partition("<!-- table: end -->")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 12
    assert {f"`{name}`" for name in PIPELINES["fuse"].split(",")} <= set(header)
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert (cells["op by op"], cells["again"], cells["not valid"]) == ("0", "0", "0"), row
        assert float(cells["error"]) < 1e-6, row
