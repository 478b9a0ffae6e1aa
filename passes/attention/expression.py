"""Scores and masks as functions of indices: small hashable expressions, FlexAttention's `mask_mod` and `score_mod`.

An expression is evaluated on whole index grids (arrays that broadcast against each other) or on single numbers, at
lengths that were never traced. The one idea: it holds no array but small run-time leaves named by number, so a mask of
a million positions is a few nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from passes import compat

Role = Literal["b", "t", "n", "s"]
"""What an axis of the scores means: batch, query position in the step, query head, key position."""
ROLES: tuple[Role, ...] = ("b", "t", "n", "s")


class Expression:
    """A node. Invariant: immutable and hashable."""


@dataclass(frozen=True)
class Core(Expression):
    """The product of queries and keys."""


@dataclass(frozen=True)
class Index(Expression):
    """The index along a role's axes, counted from 0."""

    role: Role
    dtype: str


@dataclass(frozen=True)
class Constant(Expression):
    """One number."""

    value: float | int | bool
    dtype: str


@dataclass(frozen=True)
class Leaf(Expression):
    """A run-time array, one element for each combination of its roles."""

    number: int
    roles: tuple[Role, ...]
    dtype: str


@dataclass(frozen=True)
class Apply(Expression):
    """An elementwise JAX operation; `params` as sorted pairs."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    operands: tuple[Expression, ...]

    @property
    def name(self) -> str:
        return self.primitive.name


def walk(expression: Expression) -> Sequence[Expression]:
    """Every node once, operands before what uses them."""
    found: dict[Expression, None] = {}

    def visit(node: Expression) -> None:
        if node not in found:
            for operand in node.operands if isinstance(node, Apply) else ():
                visit(operand)
            found[node] = None

    visit(expression)
    return list(found)


def evaluate(expression: Expression, core: Any, indices: Mapping[Role, Any], leaves: Sequence[Any]) -> Any:
    """The value of an expression.

    Args:
      core: What `Core` stands for; None where there is none.
      indices: Whole numbers for each role, arrays that broadcast against each other and against `core`.
      leaves: Arrays that broadcast likewise, by number.
    """
    values: dict[Expression, Any] = {}
    for node in walk(expression):
        values[node] = _value(node, values, core, indices, leaves)
    return values[expression]


def _value(
    node: Expression, values: Mapping[Expression, Any], core: Any, indices: Mapping[Role, Any], leaves: Sequence[Any]
) -> Any:
    if isinstance(node, Core):
        return core
    if isinstance(node, Index):
        return jnp.asarray(indices[node.role]).astype(node.dtype)
    if isinstance(node, Constant):
        return jnp.asarray(node.value, node.dtype)
    if isinstance(node, Leaf):
        return leaves[node.number]
    if isinstance(node, Apply):
        operands = [jnp.asarray(values[operand]) for operand in node.operands]
        rank = max(x.ndim for x in operands)
        shape = np.broadcast_shapes(*(x.shape for x in operands))
        lifted = [jnp.broadcast_to(x, shape) if x.ndim or rank else x for x in operands]
        return compat.bind(node.primitive, lifted, dict(node.params))[0]
    raise TypeError(f"not an expression: {node!r}")


def rewrite(expression: Expression, change: Callable[[Expression], Expression | None]) -> Expression:
    """The expression with every node for which `change` gives another replaced, operands first."""
    new: dict[Expression, Expression] = {}
    for node in walk(expression):
        built = node
        if isinstance(node, Apply):
            built = Apply(node.primitive, node.params, tuple(new[operand] for operand in node.operands))
        new[node] = change(built) or built
    return new[expression]


def has_core(expression: Expression) -> bool:
    """Whether the product of queries and keys enters."""
    return any(isinstance(node, Core) for node in walk(expression))
