"""The mask algebra against brute force: pairs, blocks, simplification, block lists."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.block_lists import block_list
from passes.masks import (
    All,
    And,
    BlockTable,
    KeyFlag,
    KeyLength,
    KeyRange,
    Mask,
    Not,
    Nothing,
    Offset,
    Or,
    PerHead,
    PerLayer,
    QueryRange,
    Read,
    Segment,
    Tree,
    all_of,
    any_of,
    causal,
    key_rule,
    window,
)

SIZE = 24
Q, K = np.arange(SIZE)[:, None], np.arange(SIZE)[None, :]
# Leaves: segment ids of queries and of keys, a length, flags, a table of 6 x 4 blocks, ancestor bits in two words.
NUM_MASKS, BLOCKS_A_MASK = 600, 20


def make_leaves(rng: np.random.Generator) -> list[np.ndarray]:
    return [
        np.sort(rng.integers(0, 4, SIZE)),
        rng.integers(0, 4, SIZE),
        np.asarray(rng.integers(0, SIZE + 2)),
        rng.integers(0, 2, SIZE),
        rng.integers(0, 2, (6, 4)),
        rng.integers(-(2**31), 2**31, (SIZE, 2)).astype(np.int32),
    ]


def bound(rng: np.random.Generator, low: int) -> int | None:
    return None if rng.random() < 0.25 else int(rng.integers(low, SIZE + 2))


def random_atom(rng: np.random.Generator, leaves: list[np.ndarray]) -> tuple[Mask, np.ndarray]:
    """An atom and what it holds, by the words of its docstring."""
    kind = rng.integers(0, 10)
    lo, hi = bound(rng, -SIZE), bound(rng, -SIZE)
    above, below = -(10**9) if lo is None else lo, 10**9 if hi is None else hi
    if kind <= 2:
        return Offset(lo, hi), (Q - K >= above) & (Q - K <= below)
    if kind == 3:
        return KeyRange(lo, hi), (K >= above) & (K < below) & (Q == Q)
    if kind == 4:
        return QueryRange(lo, hi), (Q >= above) & (Q < below) & (K == K)
    if kind == 5:
        return Segment(0, 1), leaves[0][:, None] == leaves[1][None, :]
    if kind == 6:
        return KeyLength(2), (K < leaves[2]) & (Q == Q)
    if kind == 7:
        return KeyFlag(3), (leaves[3][None, :] != 0) & (Q == Q)
    if kind == 8:
        return BlockTable(4, 4, 6), np.kron(leaves[4], np.ones((4, 6), int)) != 0
    table = np.zeros((SIZE, SIZE), bool)
    for q, k in itertools.product(range(SIZE), range(SIZE)):
        node = k - int(leaves[2])
        table[q, k] = 0 <= node < 64 and (int(leaves[5][q, node // 32]) >> (node % 32)) & 1 == 1
    return Tree(5, 2, 2), table


def random_mask(rng: np.random.Generator, leaves: list[np.ndarray], depth: int) -> tuple[Mask, np.ndarray]:
    if depth == 0 or rng.random() < 0.2:
        return random_atom(rng, leaves)
    if rng.random() < 0.2:
        mask, truth = random_mask(rng, leaves, depth - 1)
        return ~mask, ~truth
    (a, x), (b, y) = random_mask(rng, leaves, depth - 1), random_mask(rng, leaves, depth - 1)
    return (a & b, x & y) if rng.random() < 0.5 else (a | b, x | y)


def look_in(leaves: list[np.ndarray], q: tuple[int, int], k: tuple[int, int]):
    """Answers reads that have one value for the whole block."""

    def look(read: Read):
        if read.by == "request":
            return leaves[read.leaf]
        rows, columns = (
            {q[0] // read.block[0], (q[1] - 1) // read.block[0]},
            {
                k[0] // read.block[1],
                (k[1] - 1) // read.block[1],
            },
        )
        if read.by == "block" and len(rows) == len(columns) == 1:
            return leaves[read.leaf][rows.pop(), columns.pop()]
        return None

    return look


def random_range(rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(0, SIZE))
    return start, int(rng.integers(start + 1, SIZE + 1))


def test_random_masks_hold_what_their_parts_say_and_never_err_on_a_block():
    rng = np.random.default_rng(0)
    num_blocks = cautious = cautious_with_leaves = 0
    for _ in range(NUM_MASKS):
        leaves = make_leaves(rng)
        mask, truth = random_mask(rng, leaves, int(rng.integers(0, 4)))
        np.testing.assert_array_equal(mask.contains(Q, K, leaves), truth)
        for _ in range(BLOCKS_A_MASK):
            q, k = random_range(rng), random_range(rng)
            inside = truth[slice(*q), slice(*k)]
            for look in (None, look_in(leaves, q, k)):
                possible, certain = mask.block(*q, *k, look)
                assert bool(possible) >= bool(inside.any()), f"{mask} says that {q} by {k} holds nothing"
                assert bool(certain) <= bool(inside.all()), f"{mask} says that {q} by {k} is full"
            num_blocks += 1
            cautious += not mask.reads and (bool(possible), bool(certain)) != (inside.any(), inside.all())
            cautious_with_leaves += (bool(possible), bool(certain)) != (inside.any(), inside.all())
    assert num_blocks >= 12_000
    # An algebra that always answers "perhaps" is sound too: without leaves almost every answer is exact.
    assert cautious < 0.02 * num_blocks and cautious_with_leaves < 0.5 * num_blocks


def test_contains_is_the_same_under_tracing():
    rng = np.random.default_rng(1)
    for _ in range(3):
        leaves = make_leaves(rng)
        mask, truth = random_mask(rng, leaves, 3)
        leaves = [jnp.asarray(x, jnp.int32) for x in leaves]
        traced = jax.jit(lambda q, k, *leaves, mask=mask: mask.contains(q, k, leaves))
        np.testing.assert_array_equal(traced(jnp.asarray(Q), jnp.asarray(K), *leaves), truth)


@pytest.mark.parametrize(
    ("made", "simple"),
    [
        (causal() & All(), causal()),
        (causal() & Nothing(), Nothing()),
        (causal() | All(), All()),
        (causal() | Nothing(), causal()),
        (Offset(0, None) & Offset(None, 7), window(8)),
        (Offset(5, None) & Offset(None, 4), Nothing()),
        (KeyRange(0, 4) | KeyRange(4, 9), KeyRange(0, 9)),
        (Offset(None, 3) | Offset(4, None), All()),
        (~causal(), Offset(None, -1)),
        (~~Segment(0, 1), Segment(0, 1)),
        (Segment(0, 1) & ~Segment(0, 1), Nothing()),
        (Segment(0, 1) | ~Segment(0, 1), All()),
        (causal() & (causal() | KeyLength(0)), causal()),
        (causal() | (causal() & KeyLength(0)), causal()),
        (causal() & Segment(0, 1) & causal(), Segment(0, 1) & causal()),
        (~(causal() & KeyLength(0)), Offset(None, -1) | ~KeyLength(0)),
    ],
)
def test_trivial_cases_simplify(made, simple):
    assert made == simple and hash(made) == hash(simple)


def test_what_cannot_be_merged_is_kept():
    assert isinstance(KeyRange(0, 4) | KeyRange(5, 9), Or)
    assert isinstance(causal() & Segment(0, 1), And)
    assert isinstance(~Segment(0, 1), Not)
    assert all_of(()) == All() and any_of(()) == Nothing()


def test_the_rule_of_keys_alone_is_the_conjuncts_that_read_no_query():
    assert key_rule(causal() & KeyLength(0) & KeyRange(0, 9)) == KeyLength(0) & KeyRange(0, 9)
    assert key_rule(KeyLength(0) | KeyRange(0, 9)) == KeyLength(0) | KeyRange(0, 9)
    assert key_rule(KeyLength(0) | causal()) == All()
    assert key_rule(Segment(0, 1)) == All()


def test_beside_masks_equal_ones_are_grouped():
    mixed = PerHead((window(4), causal(), window(4)))
    assert mixed.heads == {window(4): (0, 2), causal(): (1,)}
    assert PerLayer((mixed, causal(), mixed)).layers == {mixed: (0, 2), causal(): (1,)}


def test_a_window_holds_a_key_at_least():
    with pytest.raises(ValueError, match="at least 1"):
        window(0)


@pytest.mark.parametrize(("length", "share"), [(2048, 0.596), (4096, 0.335), (32768, 0.046)])
def test_window_and_sinks_visit_few_of_the_causal_blocks(length, share):
    mask = causal() & (window(512) | KeyRange(0, 8))
    visited, dense = (block_list(m, length, length, 128, 128) for m in (mask, causal()))
    assert round(visited.share_of(dense), 3) == share


def test_a_window_is_full_only_where_both_edges_are_far():
    visited = block_list(window(512), 2048, 2048, 128, 128)
    # A row of blocks sees 511 keys back: the diagonal and the far edge are cut, the 3 between are full.
    assert (visited.num_full, visited.num_partial) == (15 + 14 + 13, 16 + 12)
    assert visited.density == (42 + 28) / 256


@pytest.mark.parametrize(("num_q", "num_k", "block_q", "block_k"), [(37, 50, 8, 16), (1, 33, 8, 8), (16, 16, 16, 16)])
def test_block_lists_cover_the_mask(num_q, num_k, block_q, block_k):
    rng = np.random.default_rng(num_k)
    for _ in range(60):
        lo = int(rng.integers(-num_k, num_q))
        mask = (Offset(lo, lo + int(rng.integers(0, 30))) | KeyRange(0, int(rng.integers(0, 5)))) & Offset(-9, None)
        mask = mask if rng.random() < 0.8 else All()
        truth = mask.contains(np.arange(num_q)[:, None], np.arange(num_k)[None, :])
        listed = block_list(mask, num_q, num_k, block_q, block_k)
        seen = np.zeros_like(truth)
        for i, (q, k) in enumerate(zip(listed.query_blocks, listed.key_blocks, strict=True)):
            block = slice(q * block_q, (q + 1) * block_q), slice(k * block_k, (k + 1) * block_k)
            seen[block] = True
            if listed.is_full[i]:
                assert truth[block].all() and truth[block].shape[1] == block_k
        assert not (truth & ~seen).any() and (np.diff(listed.row_starts) >= 0).all()
        assert listed.row_starts[-1] == listed.num_visited


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match="at least 1, got 0 queries"):
        block_list(causal(), 0, 4, 8, 8)
