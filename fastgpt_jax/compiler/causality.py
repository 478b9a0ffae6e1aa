"""Whether a forward is causal, by values: prefixes against the whole, and changes of later tokens against none.

A prefix that is read both ways, as prefix-LMs have it, is causal for requests whose first chunk holds all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgpt_jax.compiler.comparison import TOLERANCE, difference
from fastgpt_jax.compiler.forwards import Forwards
from fastgpt_jax.compiler.leak import find_leak, find_length_dependence
from fastgpt_jax.compiler.trial_tokens import change_tokens, compared_ids, special_places
from passes.cost import graph_cost

_MAX_CHANGES = 24
_CHANGE_SHARE = 100  # of the budget of one forward, so that many changes together cost less than it


def check_causal(forwards: Forwards, tokens: np.ndarray, whole: np.ndarray, lengths: Sequence[int]) -> int:
    """Compares prefixes with the whole; returns the smallest first chunk."""
    shorter = [n for n in lengths[:-1] if difference(forwards.logits(tokens[:n]), whole[:n]) > TOLERANCE]
    points = _change_points(forwards, len(tokens))
    changed = [j for j in points if _leaks(forwards, tokens, whole, j)]
    if not shorter and not changed:
        return 1
    prefix = _fixed_prefix(forwards, tokens, lengths, max(changed, default=0))
    if prefix is not None:
        return prefix
    captured = forwards.captured
    if shorter:
        raise find_length_dependence(captured, forwards.leaves, tokens, shorter[0])
    raise find_leak(
        captured, forwards.leaves, tokens, change_tokens(tokens, changed[0], captured.vocab_size), changed[0]
    )


def _change_points(forwards: Forwards, length: int) -> list[int]:
    """Where later tokens are changed; many places where a forward costs little."""
    graph = forwards.graph(length)
    affordable = 0 if graph is None else forwards.flop_budget / _CHANGE_SHARE / max(graph_cost(graph).flops, 1)
    spread = np.linspace(1, length - 1, int(min(affordable, _MAX_CHANGES)), dtype=int).tolist()
    special = special_places(length, compared_ids(forwards.captured))
    return sorted({1, 2, length // 3, length // 2, length - 1, *special, *spread} - {0, length})


def _leaks(forwards: Forwards, tokens: np.ndarray, whole: np.ndarray, at: int) -> bool:
    """Whether changing the tokens from `at` on changes logits before it."""
    return (
        difference(forwards.logits(change_tokens(tokens, at, forwards.captured.vocab_size))[:at], whole[:at])
        > TOLERANCE
    )


def _fixed_prefix(forwards: Forwards, tokens: np.ndarray, lengths: Sequence[int], last_leak: int) -> int | None:
    """The length of a prefix that is read both ways, if it is the same at every length; None otherwise.

    Changes leak from every place within such a prefix and from none behind it, so that its end can be bisected; the
    step is compared with a first chunk of just this length.
    """
    leak, safe = max(last_leak, 1), len(tokens) // 2
    if len(lengths) < 2 or leak >= safe:
        return None
    whole = {n: forwards.logits(tokens[:n]) for n in lengths}

    def leaks(length: int, at: int) -> bool:
        return _leaks(forwards, tokens[:length], whole[length], at)

    if not leaks(lengths[-1], leak) or leaks(lengths[-1], safe):
        return None
    while safe - leak > 1:
        middle = (leak + safe) // 2
        leak, safe = (middle, safe) if leaks(lengths[-1], middle) else (leak, middle)
    for n in lengths[:-1]:
        if n > safe and (difference(whole[n], whole[lengths[-1]][:n]) > TOLERANCE or not leaks(n, leak)):
            return None
    return safe
