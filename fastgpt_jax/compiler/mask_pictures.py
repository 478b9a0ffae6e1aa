"""Which token sees which, layer by layer, as small pictures: drawn from the masks that attention was recognised with.

Where attention is not recognised, the masks that the program itself lays over its scores are run instead, and the
picture says so. The one idea: a mask depends on positions alone, so it can be asked at a few hundred of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from passes.attention.expression import Expression
from passes.attention.expression import evaluate as evaluate_expression
from passes.attention.rewrite import attention
from passes.constants import splat
from passes.extract import clone, extract
from passes.graph import Graph, Op, Source, Value
from passes.replay import evaluate
from passes.simplify import simplify
from passes.sparse_attention.language import Rule, Sparsity
from passes.sparse_attention.layers import AttentionLayers, find_layers
from passes.sparse_attention.sparse_attention import choose

MAX_CELLS = 48
MAX_POSITIONS = 192
HIDDEN = -1e3
"""Scores below it are masked: the largest fill that people write is -1e4, and no score of a model comes near."""
_LEVELS = "0123456789abcdef"


@dataclass(frozen=True)
class MaskPicture:
    """One mask.

    Attributes:
      layers: First and last layer that have it, from 0, in runs.
      source: The user's line.
      num_tokens: Length that the picture spans.
      rows: From the first query to the last a text of one digit a cell, '0' for none visible to 'f' for all.
      origin: 'recognised' as attention, or 'evaluated' from the program.
      num_heads: Heads whose masks differ; 1 when all heads see the same. The picture is of the first.
    """

    layers: tuple[tuple[int, int], ...]
    source: str
    num_tokens: int
    rows: tuple[str, ...]
    origin: Literal["recognised", "evaluated"]
    num_heads: int

    @property
    def layer_text(self) -> str:
        """Such as `layers 0 to 3, 5`."""
        runs = [str(first) if first == last else f"{first} to {last}" for first, last in self.layers]
        is_one = len(self.layers) == 1 and self.layers[0][0] == self.layers[0][1]
        return f"layer{'' if is_one else 's'} {', '.join(runs)}"


@dataclass(frozen=True)
class Masks:
    """All pictures, and what there is to say about layers without one."""

    pictures: tuple[MaskPicture, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    source: Source
    num_layers: int
    is_visible: np.ndarray | None  # [heads, queries, keys] at the positions asked for; None where it is not known
    note: str = ""


def draw_masks(captured: Captured, sparsity: Sparsity | None = None) -> Masks:
    """The masks of a forward.

    Args:
      sparsity: Clauses that are laid over them, and fit.
    """
    positions = np.unique(np.linspace(0, captured.capacity - 1, MAX_POSITIONS).round().astype(np.int32))
    graph = clone(captured.graph)
    simplify(graph)
    missed = attention(graph).remarks
    found, origin = list(_recognised(graph, positions, captured.capacity, sparsity)), "recognised"
    notes = [f"attention is not recognised at {remark}" for remark in dict.fromkeys(map(str, missed))]
    if not found:
        found, origin = list(_evaluated(captured, positions)), "evaluated"
        if found:
            notes.append("attention is not recognised: these masks are run as the program has them")
        else:
            notes.append("no attention and no mask over scores is recognised in this model")
    notes += dict.fromkeys(f"{item.source.short}: {item.note}" for item in found if item.note)
    return Masks(_group(found, captured.capacity, origin), tuple(notes))


def _group(found: Sequence[_Found], num_tokens: int, origin: Any) -> tuple[MaskPicture, ...]:
    """Layers whose masks are alike share a picture."""
    pictures: dict[Any, tuple[_Found, list[tuple[int, int]]]] = {}
    layer = 0
    for item in found:
        first, layer = layer, layer + item.num_layers
        if item.is_visible is not None:
            runs = pictures.setdefault(item.is_visible.tobytes(), (item, []))[1]
            if runs and runs[-1][1] == first - 1:
                runs[-1] = (runs[-1][0], layer - 1)
            else:
                runs.append((first, layer - 1))
    return tuple(_picture(item, tuple(runs), num_tokens, origin) for item, runs in pictures.values())


def _picture(item: _Found, runs: tuple[tuple[int, int], ...], num_tokens: int, origin: Any) -> MaskPicture:
    seen = item.is_visible
    if seen is None:
        raise RuntimeError("a mask that is not known has no picture")
    num_heads = len({head.tobytes() for head in seen})
    return MaskPicture(runs, item.source.short, num_tokens, cells(seen[0]), origin, num_heads)


def cells(is_visible: np.ndarray) -> tuple[str, ...]:
    """A grid of booleans in at most `MAX_CELLS` by `MAX_CELLS` cells, each the share that is true."""
    size = min(MAX_CELLS, *is_visible.shape)
    rows = np.array_split(is_visible.astype(np.float64), size, axis=0)
    share = np.array([[cell.mean() for cell in np.array_split(row, size, axis=1)] for row in rows])
    level = np.where(share == 0, 0, np.where(share == 1, 15, np.clip(np.round(share * 15), 1, 14))).astype(int)
    return tuple("".join(_LEVELS[x] for x in row) for row in level)


# ------------------------------------------------------------------------------------------ recognised attention
def _recognised(graph: Graph, positions: np.ndarray, length: int, sparsity: Sparsity | None) -> Iterator[_Found]:
    layers = find_layers(graph)
    choice = None if sparsity is None else choose(layers, sparsity, is_unrolled=True)
    for item in layers:
        found = _of_attention(item, positions)
        if choice is None or found.is_visible is None:
            yield found
            continue
        runs = itertools.groupby(item.layers, choice.rules)  # a loop may be written out, and its layers be told apart
        for rules, run in runs:
            yield replace(
                found, num_layers=len(list(run)), is_visible=_laid_over(found.is_visible, rules, positions, length)
            )


def _laid_over(seen: np.ndarray, rules: Sequence[Rule], positions: np.ndarray, length: int) -> np.ndarray:
    asked = [rule.mask(length).contains(positions[:, None], positions[None]) for rule in rules]
    return np.broadcast_to(seen, (len(asked), *seen.shape[1:])) & np.stack(asked)


def _ops_in_loops(graph: Graph, trips: int) -> Iterator[tuple[Graph, Op, int]]:
    for op in graph.ops:
        yield graph, op, trips
        for region in op.regions:
            yield from _ops_in_loops(region, trips * op.params.get("length", 1))


def _of_attention(item: AttentionLayers, positions: np.ndarray) -> _Found:
    op, trips = item.op, len(item.layers)
    score = op.params.get("score")
    if not isinstance(score, Expression):
        return _Found(op.source, trips, None, "its mask is of a form that cannot be drawn")
    num_heads = op.operands[0].shape[2]
    leaves = []
    for leaf in op.operands[3 : 3 + op.params["num_leaves"]]:
        try:
            (known,) = evaluate(extract(item.graph, [], [leaf]), [])
        except ValueError:
            return _Found(op.source, trips, None, "its mask or bias depends on parameters or tokens")
        leaves.append(_at(np.asarray(known), positions))
    index: dict[Any, Any] = {
        "b": np.zeros((1, 1, 1, 1), np.int32),
        "t": positions[:, None, None],
        "n": np.arange(num_heads, dtype=np.int32)[:, None],
        "s": positions,
    }
    grid = (1, len(positions), num_heads, len(positions))
    core = jnp.zeros(grid, op.params["core_dtype"])
    scores = np.asarray(jnp.broadcast_to(evaluate_expression(score, core, index, leaves), grid), np.float64)
    return _Found(op.source, trips, np.moveaxis(scores[0], 1, 0) > HIDDEN)


def _at(leaf: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A leaf `[b, t, n, s]` at the positions drawn."""
    for axis in (1, 3):
        if leaf.shape[axis] > 1:
            leaf = np.take(leaf, positions, axis)
    return leaf


# ------------------------------------------------------------------------------------------ masks of the program
def _evaluated(captured: Captured, positions: np.ndarray) -> Iterator[_Found]:
    """What hides scores: the predicate of a selection with a very negative fill, or very negative numbers added."""
    times = captured.times
    for owner, op, trips in _ops_in_loops(captured.graph, 1):
        if op.name not in ("select_n", "add", "sub") or not times.is_dependent(op.result):
            continue
        if len(times.dims(op.result)) != 2:
            continue
        for i, operand in enumerate(op.operands):
            if len(times.dims(operand)) == 2 and not times.is_dependent(operand) and (op.name != "select_n" or i == 0):
                shown = _run_mask(captured, owner, op, operand, trips, positions)
                if shown is not None:
                    yield shown


def _run_mask(
    captured: Captured, graph: Graph, op: Op, operand: Value, trips: int, positions: np.ndarray
) -> _Found | None:
    hides_true = False
    if op.name == "select_n":
        hidden = [_is_hiding(v) for v in op.operands[1:]]
        if hidden.count(True) != 1:
            return None
        hides_true = hidden.index(True) == 1
    try:
        (known,) = evaluate(extract(graph, [], [operand]), [])
    except ValueError:
        return _Found(op.source, trips, None, "its mask comes from parameters or from outside its loop")
    seen = np.asarray(known)
    seen = seen != hides_true if op.name == "select_n" else seen.astype(np.float64) > HIDDEN
    if seen.all():
        return None  # a bias that hides nothing
    first, second = captured.times.dims(operand)
    seen = np.moveaxis(seen, (first, second), (-2, -1)).reshape(-1, seen.shape[first], seen.shape[second])
    if max(seen.shape[1:]) > captured.capacity:
        return _Found(op.source, trips, None, "it has more keys than tokens")
    return _Found(op.source, trips, seen[:, positions][:, :, positions])


def _is_hiding(value: Value) -> bool:
    """Whether a value is one very negative number, in any dtype and shape."""
    while value.op is not None and value.op.name in ("broadcast_in_dim", "convert_element_type", "reshape"):
        value = value.op.operands[0]
    fill = splat(value)
    return fill is not None and float(fill) < HIDDEN
