"""Random JSON schemas of the keywords that are enforced, for tests against another validator."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ["a", "b", "c d", "é", 'a"b', "x/y", "~z", "1", ""]
PATTERNS = ["^a", "b$", "^[a-c]{1,3}$", "x", r"^\d+$", ".", "^$", "a|b", "[^a]", "^(ab)*$"]
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "duration"]
TYPES = ["string", "integer", "number", "object", "array", "boolean", "null"]


class RandomSchemas:
    """Draws schemas; the same seed draws the same ones."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def draw(self) -> dict[str, Any]:
        """Returns a schema with two definitions that it may refer to."""
        return {**self._schema(0), "$defs": {"x": self._schema(2), "y": self._schema(2)}}

    def _schema(self, depth: int) -> dict[str, Any]:
        if depth > 3 or self._happens(0.06):
            return self._pick([{}, {"type": "integer"}, {"type": "null"}, {"type": "boolean"}])
        kind = self._pick(TYPES)
        schema: dict[str, Any] = {"type": kind} if self._happens(0.7) else {"type": sorted({kind, self._pick(TYPES)})}
        getattr(self, f"_add_{kind}", lambda schema, depth: None)(schema, depth)
        self._maybe(schema, 0.08, "enum", lambda: [self._value(0) for _ in range(self._count(1, 4))])
        self._maybe(schema, 0.05, "const", lambda: self._value(0))
        for name, chance in (("anyOf", 0.12), ("allOf", 0.12), ("oneOf", 0.08)):
            self._maybe(schema, chance, name, lambda: [self._schema(depth + 1) for _ in range(self._count(1, 3))])
        if depth:
            self._maybe(schema, 0.08, "$ref", lambda: self._pick(["#", "#/$defs/x", "#/$defs/y"]))
        return schema

    def _add_string(self, schema: dict[str, Any], depth: int) -> None:
        self._maybe(schema, 0.4, "minLength", lambda: self._count(0, 4))
        self._maybe(schema, 0.4, "maxLength", lambda: self._count(0, 8))
        self._maybe(schema, 0.3, "pattern", lambda: self._pick(PATTERNS))
        self._maybe(schema, 0.15, "format", lambda: self._pick(FORMATS))

    def _add_integer(self, schema: dict[str, Any], depth: int) -> None:
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            self._maybe(schema, 0.25, name, lambda: round(float(self._rng.normal()) * 20, self._count(0, 3)))
        self._maybe(schema, 0.25, "multipleOf", lambda: self._pick([1, 2, 3, 5, 7, 10]))

    _add_number = _add_integer

    def _add_object(self, schema: dict[str, Any], depth: int) -> None:
        names = sorted({self._pick(NAMES) for _ in range(self._count(0, 4))})
        schema["properties"] = {name: self._schema(depth + 1) for name in names}
        required = {name for name in names if self._happens(0.5)}
        schema["required"] = sorted(required | ({self._pick(NAMES)} if self._happens(0.2) else set()))
        self._maybe(schema, 0.5, "additionalProperties", lambda: self._schema(depth + 1) or False)
        self._maybe(schema, 0.2, "patternProperties", lambda: {self._pick(PATTERNS): self._schema(depth + 1)})
        self._maybe(schema, 0.2, "maxProperties", lambda: self._count(0, 5))
        self._maybe(schema, 0.2, "minProperties", lambda: self._count(0, 3))

    def _add_array(self, schema: dict[str, Any], depth: int) -> None:
        self._maybe(schema, 0.7, "items", lambda: self._schema(depth + 1))
        self._maybe(schema, 0.3, "prefixItems", lambda: [self._schema(depth + 1) for _ in range(self._count(1, 3))])
        self._maybe(schema, 0.4, "minItems", lambda: self._count(0, 3))
        self._maybe(schema, 0.5, "maxItems", lambda: self._count(0, 5))

    def _value(self, depth: int) -> Any:
        kind = self._count(0, 6 if depth < 2 else 4)
        if kind < 4:
            text = self._pick(["", "a", "ab", "é", 'a"b', "x\n", "1", "🐢", "\\", "abc"])
            return [None, bool(self._count(0, 2)), self._count(-20, 20), text][kind]
        if kind == 4:
            return [self._value(depth + 1) for _ in range(self._count(0, 3))]
        return {self._pick(NAMES): self._value(depth + 1) for _ in range(self._count(0, 3))}

    def _maybe(self, schema: dict[str, Any], chance: float, name: str, make: Any) -> None:
        if self._happens(chance):
            schema[name] = make()

    def _happens(self, chance: float) -> bool:
        return bool(self._rng.random() < chance)

    def _count(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high))

    def _pick(self, things: list[Any]) -> Any:
        return things[self._count(0, len(things))]
