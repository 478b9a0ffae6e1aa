"""Frozen dataclasses to plain JSON values and back, strictly: every field there, of its type, and none besides.

Knows no artifact. The one idea: the type annotations are the schema, so that the format is written down once.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value is not what the dataclass says; the message names the place."""

    def __init__(self, what: str, place: str = ""):
        super().__init__(f"{place} {what}".strip())
        self._what, self._place = what, place

    def inside(self, place: str) -> SchemaError:
        """The same, one level further out."""
        joint = "" if not self._place or self._place.startswith("[") else "."
        return SchemaError(self._what, f"{place}{joint}{self._place}")


def encode(value: Any) -> Any:
    """JSON values of a dataclass: objects, lists, and plain values."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(kind: type[T], value: Any) -> T:
    """The dataclass of JSON values.

    Raises:
      SchemaError: A field is missing, unknown or of another type.
    """
    return _decoder(kind)(value)


Decoder = Callable[[Any], Any]


@functools.cache
def _decoder(kind: Any) -> Decoder:
    """The function that decodes values of a type; made once, since a manifest holds thousands of few types."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_decoder(kind)
    if origin is tuple:
        return _tuple_decoder(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_decoder(_decoder(arguments[1]))
    if origin is typing.Literal:
        return _checked(lambda value: value in arguments, f"one of {', '.join(map(str, arguments))}")
    if origin in (types.UnionType, typing.Union):
        (inner,) = (_decoder(a) for a in arguments if a is not types.NoneType)
        return lambda value: None if value is None else inner(value)
    if kind is float:
        is_number = _checked(lambda value: type(value) in (int, float), "a number")
        return lambda value: float(is_number(value))
    return _checked(lambda value: type(value) is kind, f"of type {kind.__name__}")


def _dataclass_decoder(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    decoders: dict[str, Decoder] = {}

    def run(value: Any) -> Any:
        if not decoders:  # a type may hold itself
            decoders.update({name: _decoder(hint) for name, hint in fields.items()})
        if not isinstance(value, dict):
            raise SchemaError(_must_be("an object", value))
        for name in value:
            if name not in fields:
                raise SchemaError(f"has no field {name}").inside(kind.__name__)
        for name in fields:
            if name not in value:
                raise SchemaError("is missing").inside(name)
        return kind(**{name: _at(name, decoder, value[name]) for name, decoder in decoders.items()})

    return run


def _tuple_decoder(arguments: tuple[Any, ...]) -> Decoder:
    is_open = len(arguments) == 2 and arguments[1] is Ellipsis
    decoders = [_decoder(argument) for argument in arguments if argument is not Ellipsis]

    def run(value: Any) -> Any:
        if not isinstance(value, list):
            raise SchemaError(_must_be("a list", value))
        each = decoders * len(value) if is_open else decoders
        if len(each) != len(value):
            raise SchemaError(_must_be(f"a list of {len(each)}", value))
        return tuple(_at(f"[{i}]", decoder, item) for i, (decoder, item) in enumerate(zip(each, value, strict=True)))

    return run


def _mapping_decoder(inner: Decoder) -> Decoder:
    def run(value: Any) -> Any:
        if not isinstance(value, dict):
            raise SchemaError(_must_be("an object", value))
        return {key: _at(key, inner, item) for key, item in value.items()}

    return run


def _at(place: str, decoder: Decoder, value: Any) -> Any:
    try:
        return decoder(value)
    except SchemaError as error:
        raise error.inside(place) from None


def _checked(holds: Callable[[Any], bool], expected: str) -> Decoder:
    def run(value: Any) -> Any:
        if not holds(value):
            raise SchemaError(_must_be(expected, value))
        return value

    return run


def _must_be(expected: str, value: Any) -> str:
    return f"must be {expected}, got {str(value)[:80]!r}"
