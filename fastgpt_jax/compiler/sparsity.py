"""What a compile is asked to leave out of attention: the clauses of `--sparse`, and the passes that carry them out.

Knows no engine. The one idea: clauses are held against the layers of the forward before any work is done, and against
those of every step when it is made, so that a layer that was not recognised cannot move the numbers of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastgpt_jax.compiler.kernel_choice import TARGET_PASSES
from fastgpt_jax.errors import UserError
from passes.attention.rewrite import attention
from passes.extract import clone
from passes.graph import Graph
from passes.numerics import Numerics
from passes.registry import PASSES, Pass
from passes.result import PassResult
from passes.simplify import simplify
from passes.sparse_attention.language import Sparsity, SparsityError
from passes.sparse_attention.layers import find_layers
from passes.sparse_attention.parser import parse_sparsity
from passes.sparse_attention.sparse_attention import choose, sparse_attention

PASS = "sparse_attention"
_BEHIND = ("quantize_weights", *TARGET_PASSES)
"""Passes that come after attention is made sparse."""


def read_sparsity(text: str) -> Sparsity:
    """The clauses of a text.

    Raises:
      UserError: It is none.
    """
    try:
        return parse_sparsity(text)
    except SparsityError as error:
        raise UserError(f"sparse {_shown(text)} {error}") from error


def check_sparsity(graph: Graph, text: str, *, is_unrolled: bool, is_strict: bool) -> tuple[int, str]:
    """Holds clauses against a forward.

    Args:
      is_unrolled: Whether loops over layers will be written out.
      is_strict: Whether a clause that decides about nothing is an error.

    Returns: How many layers of attention there are, and a line for the user.

    Raises:
      UserError: The clauses do not fit.
    """
    sparsity, copy = read_sparsity(text), clone(graph)
    simplify(copy)
    attention(copy)
    layers = find_layers(copy)
    if not layers:
        raise UserError("sparse needs attention that is recognised, and there is none in this model; leave it out")
    try:
        choice = choose(layers, sparsity, is_unrolled=is_unrolled)
    except SparsityError as error:
        raise UserError(f"sparse {_shown(text)} {error}") from error
    unused = "; ".join(repr(str(clause)) for clause in choice.unused)
    if unused and is_strict:
        raise UserError(
            f"sparse has clauses that decide about no head, since earlier ones do: {unused}; leave them out"
        )
    line = f"{sparsity} over {len(choice.clauses)} layers"
    return len(choice.clauses), f"{line}; decides about no head: {unused}" if unused else line


def with_sparsity(
    pipeline: Sequence[Pass], text: str | None, length: int | None = None, num_layers: int | None = None
) -> tuple[Pass, ...]:
    """A pipeline that makes attention sparse where it has recognised it; itself where nothing is asked for.

    Args:
      length: Longest request in tokens.
      num_layers: Layers of attention that the program must have.
    """
    if text is None:
        return tuple(pipeline)
    entry = Pass(PASS, partial(_run, read_sparsity(text), length, num_layers), Numerics.LOSSY, True, text)
    passes = [p for p in pipeline if p.name not in ("per_head", "narrow_reads")]
    names = [p.name for p in passes]
    added = [entry, PASSES["per_head"], PASSES["narrow_reads"], PASSES["simplify"]]
    if "attention" in names:
        at = len(names) - names[::-1].index("attention")
    else:
        at = next((i for i, name in enumerate(names) if name in _BEHIND), len(names))
        added.insert(0, PASSES["attention"])
    return (*passes[:at], *added, *passes[at:])


def _run(sparsity: Sparsity, length: int | None, num_layers: int | None, graph: Graph, counter: Any) -> PassResult:
    try:
        return sparse_attention(graph, sparsity, counter, length=length, num_layers=num_layers)
    except SparsityError as error:
        raise UserError(f"sparse {_shown(str(sparsity))} {error}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
