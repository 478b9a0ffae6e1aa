"""Frozen dataclasses to plain JSON values and back, strictly: every field there, of its type, and none besides.

Knows no artifact. The one idea: the type annotations are the schema, so that the format is written down once.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value is not what the dataclass says; the message names the place."""


def encode(value: Any) -> Any:
    """JSON values of a dataclass: objects, lists, and plain values."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """The dataclass of JSON values.

    Args:
      where: What the value is called in errors.

    Raises:
      SchemaError: A field is missing, unknown or of another type.
    """
    return _decode(kind, value, where)


@functools.cache
def _fields(kind: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is Mapping or isinstance(origin, type) and issubclass(origin, Mapping):
        _check(isinstance(value, dict), value, "an object", where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        _check(value in arguments, value, f"one of {', '.join(map(str, arguments))}", where)
        return value
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _decode(next(a for a in arguments if a is not types.NoneType), value, where)
    if kind is float:
        _check(isinstance(value, (int, float)) and not isinstance(value, bool), value, "a number", where)
        return float(value)
    _check(type(value) is kind, value, f"of type {kind.__name__}", where)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), value, "an object", where)
    fields = _fields(kind)
    for name in value:
        _check(name in fields, name, f"a field of {kind.__name__}", where)
    for name in fields:
        if name not in value:
            raise SchemaError(f"{where}.{name} is missing".lstrip("."))
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}".lstrip(".")) for name, hint in fields.items()})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _check(isinstance(value, list), value, "a list", where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    _check(len(value) == len(arguments), value, f"a list of {len(arguments)}", where)
    return tuple(
        _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _check(holds: bool, value: Any, expected: str, where: str) -> None:
    if not holds:
        raise SchemaError(f"{where or 'the value'} must be {expected}, got {str(value)[:80]!r}")
