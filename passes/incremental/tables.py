"""Values known without tokens, in the rows wanted: taken from the whole, or from the diagonals of a Toeplitz table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from passes.graph import Value
from passes.incremental.roles import Keys, Role, Rows
from passes.incremental.rules.movement import take_rows
from passes.incremental.site import restricted_shape


def take(whole: Callable[..., Any], roles: dict[int, Role], value: Value) -> Callable[..., Any]:
    """The wanted rows of an array that has all of them."""

    def emit(ctx: Any, xs: Any) -> Any:
        x = whole(ctx, xs)
        for dim, role in roles.items():
            if isinstance(role, Rows):
                x = take_rows(ctx, x, dim, ctx.indices(role, value.shape[dim]))
        return x

    return emit


def table(value: Value, roles: dict[int, Role]) -> Callable[..., Any]:
    """A constant built at trace time, as a function of positions: Toeplitz (masks, ALiBi, decay) or any table."""
    constant = value.const
    diagonals = _toeplitz(constant, roles)
    if diagonals is None:
        return take(lambda ctx, xs: ctx.constant(value), roles, value)
    (q_dim, q_role), (k_dim, k_role) = roles.items()
    size = value.shape[q_dim]

    def emit(ctx: Any, xs: Any) -> Any:
        q = ctx.indices(q_role, size)[:, None]
        k = ctx.indices(k_role, size)[None] if isinstance(k_role, Rows) else jnp.arange(size)[None]
        table = ctx.widening.array(jnp.asarray(diagonals))
        out = table[jnp.clip(q - k + size - 1, 0, len(diagonals) - 1)]
        return out.reshape(restricted_shape(value, roles, ctx.num_rows))

    return emit


def _toeplitz(constant: Any, roles: dict[int, Role]) -> Any | None:
    """The diagonals `c[q - k]` of a square constant that depends on the difference of positions only."""
    if len(roles) != 2 or isinstance(next(iter(roles.values())), Keys) or not isinstance(constant, np.ndarray):
        return None
    a, b = roles
    n = constant.shape[a]
    if constant.shape[b] != n or constant.size != n * n:
        return None
    m = constant.reshape(n, n)
    if m[1:, 1:].tobytes() != m[:-1, :-1].tobytes():
        return None
    return np.concatenate([m[0, ::-1], m[1:, 0]])
