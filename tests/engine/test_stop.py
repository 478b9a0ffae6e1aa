"""Stop strings are judged as if characters arrived one by one, and nothing is shown that one may swallow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastgpt_jax.engine.stop import find_stop, visible_length

TEXT = st.text("ab", max_size=14)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(TEXT, STOPS, st.integers(1, 5))
def test_pieces_of_any_size_give_the_same_end_and_show_only_the_final_text(text, stops, piece_len):
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    shown, match, seen = 0, None, 0
    while match is None and seen < len(text):
        so_far = text[: seen + piece_len]
        match = find_stop(so_far, stops, seen)
        seen = len(so_far)
        if match is None:
            now = visible_length(so_far, stops)
            assert now >= shown
            shown = now
    if not ends:
        assert match is None
    else:
        assert match is not None and match.end == ends[0]
        assert text[match.start : match.end] == match.stop
        assert shown <= match.start


def test_the_longest_of_stops_that_end_together_wins():
    match = find_stop("xxab", ("b", "ab"))
    assert match is not None and (match.stop, match.start) == ("ab", 2)


def test_only_a_suffix_that_begins_a_stop_string_is_held_back():
    assert visible_length("hello\n", ("\n\nUser:",)) == 5
    assert visible_length("hello\nx", ("\n\nUser:",)) == 7
    assert visible_length("hello", ()) == 5
