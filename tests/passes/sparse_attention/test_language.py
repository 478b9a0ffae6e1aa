"""The text of `--sparse`: what it means, in which order, and that a mistake is one line with its place."""

import numpy as np
import pytest

from passes.masks import All, KeyRange, Offset
from passes.sparse_attention.language import Full, SparsityError, Window, solve_density
from passes.sparse_attention.parser import parse_sparsity

EXAMPLE = "layers[0:4]: window(512)|sinks(8); layers[4:8]: density(0.3); heads[0:half]: window(512)"


def test_text_is_read_and_printed_in_one_form():
    printed = "layers[0:4]: window(512) | sinks(8); layers[4:8]: density(0.3); heads[0:half]: window(512)"
    assert str(parse_sparsity(EXAMPLE)) == printed
    assert parse_sparsity(printed).choose([2] * 9) is not None
    again = parse_sparsity("layers[-1], heads[half:] : (window(4)|sinks(1))&full ;")
    assert str(again) == "layers[-1] heads[half:]: (window(4) | sinks(1)) & full"


def test_the_first_clause_that_selects_a_head_decides():
    choice = parse_sparsity(EXAMPLE).choose([4] * 10)
    assert [choice.clauses[i] for i in (0, 4, 8)] == [(0,) * 4, (1,) * 4, (2, 2, None, None)]
    assert choice.rules(9) == (Window(512), Window(512), Full(), Full())
    assert choice.unused == ()


def test_a_clause_behind_others_that_decide_everything_is_unused():
    (unused,) = parse_sparsity(EXAMPLE).choose([4] * 8).unused
    assert str(unused) == "heads[0:half]: window(512)"
    exempt = parse_sparsity("layers[0]: full; all: window(3)").choose([1, 1])
    assert exempt.clauses == ((0,), (1,)) and not exempt.unused


@pytest.mark.parametrize(
    "text, mask",
    [
        ("window(5)", Offset(0, 4)),
        ("window(16)", Offset(0, None)),
        ("sinks(2)", KeyRange(None, 2)),
        ("sinks(99)", KeyRange(None, 16)),
        ("full", All()),
        ("density(1)", Offset(0, None)),
        ("window(5) | sinks(2)", Offset(0, 4) | KeyRange(None, 2)),
        ("window(5) & window(3)", Offset(0, 2)),
        ("sinks(1) | window(5) & window(3)", Offset(0, 2) | KeyRange(None, 1)),  # & binds first
        ("(sinks(1) | window(5)) & window(3)", (Offset(0, 4) | KeyRange(None, 1)) & Offset(0, 2)),
    ],
)
def test_rules_are_masks(text, mask):
    (clause,) = parse_sparsity(f"all: {text}").clauses
    assert clause.rule.mask(16) == mask


def test_densities_are_solved_to_the_windows_that_hold_them():
    assert [solve_density(d, 4096) for d in (0.1, 0.3, 0.5)] == [210, 669, 1200]
    for density in (0.05, 0.3, 0.9):
        n = 1024
        held = np.minimum(np.arange(n) + 1, solve_density(density, n)).sum()
        assert held / (n * (n + 1) / 2) == pytest.approx(density, abs=2e-3)
    assert solve_density(1e-9, 64) == 1 and solve_density(1.0, 64) == 64


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "character 1: there must be a clause"),
        ("al: full", "character 1: there must be a selection of layers.*, got 'al'"),
        ("all", "character 4: there must be ':' and a rule.*, got the end"),
        ("all:", "character 5: there must be a rule of window.*, got the end"),
        ("all: windw(3)", "character 6: there must be a rule of window.*, got 'windw'"),
        ("all: window(0)", "character 13: there must be a whole number of at least 1, as in window.*, got '0'"),
        ("all: window(2.5)", "whole number of at least 1, .*, got '2.5'"),
        ("all: density(0)", r"a share above 0 and at most 1, as in density\(0.3\), got '0'"),
        ("all: density(1.5)", "a share above 0 and at most 1"),
        ("all: window(3) sinks(3)", "character 16: there must be ';' before the next clause"),
        ("all: (window(3)", "character 16: there must be '\\)'"),
        ("layers[a]: full", "character 8: there must be a whole number or 'half', got 'a'"),
        ("layers[0:4", "character 11: there must be '\\]' behind the bounds"),
        ("layers[0] layers[1]: full", "character 11: there must be ':' and a rule"),
        ("layers[0] all: full", "character 11: .* 'all' stands alone"),
        ("all: full §", "character 11: .*got '§'"),
        ("all: full ß; heads[0:1]: full", "character 11: there must be ';' before the next clause, got 'ß'"),
        ("all: " + "(" * 5000 + "full" + ")" * 5000, "character 70: there must be a rule in at most 64 parentheses"),
    ],
)
def test_a_mistake_names_its_place_and_what_may_stand_there(text, message):
    with pytest.raises(SparsityError, match=message) as error:
        parse_sparsity(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("all: full; layers[0:12]: full", r"at character 12: layers\[0:12\] reaches outside of the 8 layers"),
        ("layers[-9:]: full", "reaches outside of the 8 layers"),
        ("layers[8]: full", "reaches outside of the 8 layers"),
        ("heads[5:]: full", "reaches outside of the 4 heads"),
        ("layers[4:4]: full", r"layers\[4:4\] selects none of the 8 layers"),
        ("heads[3:half]: full", r"heads\[3:half\] selects none of the 4 heads"),
    ],
)
def test_a_selection_that_does_not_fit_the_model_is_told(text, message):
    with pytest.raises(SparsityError, match=message):
        parse_sparsity(text).choose([4] * 8)
