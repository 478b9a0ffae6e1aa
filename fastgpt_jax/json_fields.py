"""JSON files read with one clear line for each way in which they can be wrong.

Knows no format in particular. The one idea: a field is asked for by name and type, and what is missing or of another
type is a `UserError` that names the file, the field and the value found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt_jax.errors import UserError

_REQUIRED: Any = object()


class Fields:
    """A JSON object and the place it came from. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive integer, or `default` where the field is absent."""
        return self._get(name, default, "a positive integer", lambda v: isinstance(v, int) and v > 0)

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite number as a float, or `default` where the field is absent."""
        value = self._get(name, default, "a finite number", lambda v: isinstance(v, int | float) and abs(v) < 1e300)
        return float(value) if name in self else value

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._get(name, default, "true or false", lambda v: isinstance(v, bool), allow_bool=True)

    def string(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._get(name, default, "a string", lambda v: isinstance(v, str))

    def object(self, name: str) -> Fields:
        """The object under `name`, empty where the field is absent."""
        value = self._get(name, {}, "an object", lambda v: isinstance(v, dict))
        return Fields(value, f"{name} of {self.where}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids written as one integer or as a list of them; none where the field is absent."""
        value = self._get(name, [], "a token id or a list of them", _is_token_ids)
        return (value,) if isinstance(value, int) else tuple(value)

    def require(self, name: str, expected: Any, default: Any) -> None:
        """Refuses a setting that the model forwards here do not have."""
        value = self.values.get(name)
        if (default if value is None else value) != expected:
            raise UserError(f"{self.where} has {name}={value!r}, which is not supported; only {expected!r} is")

    def _get(self, name: str, default: Any, kind: str, is_valid: Any, *, allow_bool: bool = False) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where} must give {name}, {kind}; it is missing")
            return default
        if not is_valid(value) or (isinstance(value, bool) and not allow_bool):
            raise UserError(f"{self.where} must give {name} as {kind}, got {value!r}")
        return value


def read_json_object(path: Path) -> Fields:
    """Reads a file that must hold one JSON object.

    Raises:
      UserError: The file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return Fields(values, str(path))


def read_optional_json_object(path: Path) -> Fields:
    """The same, and an empty object where there is no such file."""
    return read_json_object(path) if path.exists() else Fields({}, str(path))


def _is_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
