"""The tokens that a certificate tries a forward on: random ones, and those that the forward itself asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgpt_jax.compiler.capture import Captured
from passes.graph import Value

_MAX_SPECIAL = 6
_SAME_TOKENS = frozenset(
    "convert_element_type reshape squeeze expand_dims broadcast_in_dim transpose slice copy pad concatenate".split()
)


def make_trial_tokens(length: int, vocab_size: int, special: Sequence[int], seed: int) -> np.ndarray:
    """Random tokens i32 [T], and late among them each special one twice in a row, where there is room.

    The usual padding id 0 does not come first, where masks of tokens leave nothing to attend to.
    """
    rng, low = np.random.default_rng(seed), int(vocab_size > 2)
    tokens = rng.integers(low, vocab_size, length, dtype=np.int32)
    tokens[rng.integers(0, length, max(1, length // 16))] = 0
    tokens[:2] = np.maximum(tokens[:2], low)
    for place, token in zip(special_places(length, special), special, strict=False):
        tokens[place - 1 : place + 1] = min(token, vocab_size - 1)
    return tokens


def special_places(length: int, special: Sequence[int]) -> list[int]:
    """Where the second token of each pair of special ones stands: in the last third, since one may end the text."""
    return list(range(2 * length // 3 + 2, length, 2))[: len(special)]


def compared_ids(captured: Captured) -> list[int]:
    """Token ids that the forward compares tokens with: padding, separators, placeholders of images.

    Random tokens would hardly ever meet them, let alone twice in a row.
    """
    found: dict[int, None] = {}
    tokens = {captured.token_input}
    for op in captured.graph.ops:
        if not tokens.intersection(op.operands):
            continue
        if op.name in _SAME_TOKENS:
            tokens.update(op.results)
        elif op.name in ("eq", "ne", "lt", "le", "gt", "ge"):
            constants = [v.const for v in map(_unspread, op.operands) if v.const is not None]
            near = (0,) if op.name in ("eq", "ne") else (0, -1, 1)
            few = [c for c in constants if np.size(c) <= _MAX_SPECIAL and not (op.name == "lt" and not np.any(c))]
            ids = [int(x) + n for c in few for x in np.ravel(c) for n in near]  # below 0 only an index is asked for
            found.update(dict.fromkeys(i for i in ids if 0 <= i < captured.vocab_size))
    return list(found)[:_MAX_SPECIAL]


def _unspread(value: Value) -> Value:
    """What a value is a copy of, in another shape."""
    while value.op is not None and value.op.name in _SAME_TOKENS:
        value = value.op.operands[0]
    return value


def change_tokens(tokens: np.ndarray, at: int, vocab_size: int) -> np.ndarray:
    """The same tokens i32 [T] before `at`, others from there on."""
    changed, low = tokens.copy(), int(vocab_size > 2)
    changed[at:] = low + (changed[at:] - low + 1) % (vocab_size - low)
    return changed
