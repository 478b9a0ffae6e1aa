"""Which weights are quantized, and how: rules over the name of a parameter and what reads it. The first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from passes.quantization.schemes import Scheme

OPS = ("dot", "gather", "*")


@dataclass(frozen=True)
class QuantizationRule:
    """What becomes of some weights.

    Attributes:
      pattern: A regular expression for the whole path of a parameter, such as `layers.0.mlp.up.kernel`.
      op: Whether it is about products, look-ups of rows, or both.
      scheme: None leaves the weights as they are.
    """

    pattern: str
    op: Literal["dot", "gather", "*"]
    scheme: Scheme | None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {self.op!r}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error

    def matches(self, path: str, op: str) -> bool:
        """Whether the rule is about parameter `path` read by `op`."""
        return self.op in ("*", op) and re.fullmatch(self.pattern, path) is not None

    def __str__(self) -> str:
        return f"{self.pattern!r} for {self.op}"


Rules = Sequence[QuantizationRule]


def default_rules(scheme: Scheme) -> tuple[QuantizationRule, ...]:
    """Everything but norms and what routes tokens to experts, where a small error decides between whole experts."""
    return (
        QuantizationRule(r"(?i).*norm.*", "*", None),
        QuantizationRule(r"(?i).*router.*", "*", None),
        QuantizationRule(r".*", "*", scheme),
    )


def find_rule(rules: Rules, path: str, op: str) -> QuantizationRule | None:
    """The first rule that is about `path` read by `op`."""
    return next((rule for rule in rules if rule.matches(path, op)), None)


def unused_rules(rules: Rules, sites: Iterable[tuple[str, str]]) -> list[QuantizationRule]:
    """The rules that decide about none of `sites`, pairs of a path and what reads it."""
    used = [find_rule(rules, path, op) for path, op in sites]
    return [rule for rule in rules if not any(rule is found for found in used)]
