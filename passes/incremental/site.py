"""What a rule sees: an operation, the result wanted of it, and the role of each of its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from passes.graph import Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.roles import KEYS, Demand, Keys, Role, Rows
from passes.incremental.state import State
from passes.incremental.time import Times


@dataclass(frozen=True)
class Site:
    """One demand on one result of an operation.

    Attributes:
      over_time: Whether the operation stands in a loop over tokens, where a value without a time axis belongs to one.
      keep: Registers state: `keep(kind, value, shape, time_dim)`.
    """

    op: Op
    value: Value
    roles: dict[int, Role]
    times: Times
    over_time: bool
    keep: Callable[[Any, Value, tuple[int, ...], int], State]

    @property
    def is_dependent(self) -> bool:
        return self.times.is_dependent(self.value)

    def refuse(self, reason: str) -> NotServable:
        """The exception that names this operation; to be raised by the caller."""
        shapes = ", ".join(self.times.describe(v) for v in self.op.operands)
        return NotServable(reason, self.op, detail=f"{shapes} -> {self.times.describe(self.value)}")

    def demand(self, value: Value, roles: Mapping[int, Role | None]) -> Demand:
        """A demand on an operand, given roles for its dimensions.

        Raises:
          NotServable: one of its time dimensions has no role, so the operation mixes tokens in a way without a rule.
        """
        wanted = []
        for dim in self.times.dims(value):
            role = roles.get(dim)
            if role is None:
                raise self.refuse("mixes tokens in a way that has no incremental form")
            wanted.append(role)
        return Demand(value, tuple(wanted))

    def same(self, value: Value) -> Demand:
        """The operand's dimensions in the roles of the result's."""
        return self.demand(value, self.roles)

    def all_keys(self, value: Value) -> Demand:
        return Demand(value, (KEYS,) * len(self.times.dims(value)))

    def is_rows(self, dim: int) -> bool:
        """Whether a dimension of the result is wanted in the rows of the new tokens."""
        return isinstance(self.roles.get(dim), Rows)

    def plain_rows(self, dim: int) -> Rows:
        """The role of a dimension that holds nothing but time.

        Raises:
          NotServable: other axes are merged into it.
        """
        role = self.roles[dim]
        if not isinstance(role, Rows) or role.copies != 1:
            raise self.refuse(
                "shifts a dimension in which time is merged with other axes; move the shift before the merge"
            )
        return role

    def require_query_axis(self) -> None:
        """Refuses a reduction over all tokens that keeps no query axis.

        Raises:
          NotServable: early tokens would see later ones through the result.
        """
        if self.is_dependent and not self.over_time and not any(isinstance(r, Rows) for r in self.roles.values()):
            raise self.refuse(
                "combines all tokens over time and keeps no query axis, so early tokens would see later ones"
            )


def restricted_shape(value: Value, roles: Mapping[int, Any], num_rows: int) -> tuple[int, ...]:
    """The shape of a value in the rows wanted of it, for `num_rows` new tokens."""
    out = list(value.shape)
    for dim, role in roles.items():
        if isinstance(role, Rows):
            out[dim] = role.copies * num_rows
    return tuple(out)


def is_keys(role: Any) -> bool:
    """Whether all rows are wanted."""
    return isinstance(role, Keys)
