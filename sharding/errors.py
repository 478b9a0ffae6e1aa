"""What can be wrong with a placement; whoever faces the user tells it in one line."""

from __future__ import annotations


class ShardingError(ValueError):
    """Arrays cannot be placed as asked; the message names the requirement, the value and the way out."""


class DivisibilityError(ShardingError):
    """A dimension cannot be cut into as many equal parts as there are devices along its mesh axis."""
