"""Where a mask can hold keys, against the mask itself."""

import numpy as np
import pytest

from passes.masks import All, KeyFlag, KeyLength, KeyRange, Nothing, Offset
from passes.sparse_attention.read_positions import ReadPositions
from passes.sparse_attention.support import Support, find_support

CASES = {
    "window": (Offset(0, 4), Support((0, 4))),
    "causal": (Offset(0, None), None),
    "everything": (All(), None),
    "nothing": (Nothing(), Support(None)),
    "window and sinks": (Offset(0, None) & (Offset(None, 4) | KeyRange(None, 2)), Support((0, 4), ((0, 2),))),
    "window or sinks": (Offset(0, 4) | KeyRange(0, 2), Support((0, 4), ((0, 2),))),
    "two ranges": (KeyRange(3, 5) | KeyRange(9, 11) | Offset(0, 1), Support((0, 1), ((3, 5), (9, 11)))),
    "what touches": (KeyRange(0, 4) | (KeyRange(2, 8) & KeyFlag(0)), Support(None, ((0, 8),))),
    "two windows": (Offset(0, 2) | Offset(5, 7), Support((0, 7))),
    "the smaller of two": (Offset(0, 9) & (Offset(0, 4) | KeyRange(0, 1)) & KeyFlag(0), Support((0, 4), ((0, 1),))),
    "sinks in a window": (Offset(0, 4) & (KeyRange(0, 2) | KeyFlag(0)), Support((0, 4))),
    "one part without end": (Offset(0, 4) | KeyFlag(0), None),
    "a length": (KeyLength(0), None),
    "ahead of the query": (Offset(-2, 1), Support((-2, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_support_of(name):
    mask, expected = CASES[name]
    assert find_support(mask) == expected


@pytest.mark.parametrize("name", [name for name, (mask, support) in CASES.items() if support and not mask.reads])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_rows_read_are_the_rows_seen_each_once(name, num_queries):
    mask, support = CASES[name]
    capacity = 16
    positions = ReadPositions(support, num_queries, capacity)
    starts = np.arange(capacity - num_queries + 1, dtype=np.int32)
    reads, shown = map(np.asarray, positions.make(starts))
    assert reads.shape == shown.shape == (len(starts), positions.num_rows) and reads.min(initial=0) >= 0
    assert reads.max(initial=0) < capacity
    for start, read, position in zip(starts, reads, shown, strict=True):
        for q in range(start, start + num_queries):
            seen = np.flatnonzero(mask.contains(np.int32(q), np.arange(capacity)))
            held = read[np.broadcast_to(mask.contains(np.int32(q), position), read.shape)]
            np.testing.assert_array_equal(np.sort(held), seen)
