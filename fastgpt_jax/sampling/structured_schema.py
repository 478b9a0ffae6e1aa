"""JSON schemas before they reach the grammar engine: what cannot be enforced is refused, by name and place.

Knows the keywords of drafts 4 to 2020-12, and no grammar. The one idea: a keyword is enforced, says nothing about
instances, or is refused; none is passed over. So every place where a schema may stand is walked, and a reference may
lead to such a place alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_formats import EXACT, PATTERNS
from fastgpt_jax.sampling.structured_params import MAX_DEPTH, MAX_MERGED_PATTERNS
from fastgpt_jax.sampling.structured_regex import translate_pattern

_DRAFTS: Mapping[str, int] = MappingProxyType(
    {
        "https://json-schema.org/draft/2020-12/schema": 2020,
        "https://json-schema.org/draft/2019-09/schema": 2019,
        "http://json-schema.org/draft-07/schema": 7,
        "http://json-schema.org/draft-06/schema": 6,
        "http://json-schema.org/draft-04/schema": 4,
    }
)
_SCHEMA = frozenset({"additionalProperties", "additionalItems"})
_SCHEMA_MAP = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMA_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_PLAIN = frozenset(
    {"type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "required"}
    | {"$schema", "$id", "id", "$anchor"}
)
_COUNTS = frozenset({"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"})
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"discriminator"}
)
_CONTENT = frozenset({"contentEncoding", "contentMediaType", "contentSchema"})  # assertions in draft 7, notes since
_SINCE: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "const": (6, 2020),
        "$id": (6, 2020),
        "id": (4, 4),
        "$anchor": (2019, 2020),
        "prefixItems": (2020, 2020),
        "additionalItems": (4, 2019),
        "contentEncoding": (2019, 2020),
        "contentMediaType": (2019, 2020),
        "contentSchema": (2019, 2020),
    }
)
"""Keyword -> the first and last draft in which it means what it is taken for here."""

_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_POINTER_STEP = re.compile(
    r"/(?:(?:properties|patternProperties|\$defs|definitions)/[^/]*|(?:allOf|anyOf|oneOf|prefixItems)/[0-9]+"
    r"|items(?:/[0-9]+)?|additionalProperties|additionalItems)"
)


def prepare_schema(text: str) -> Any:
    """Returns the schema that the grammar engine shall enforce; raises UserError for what it cannot."""
    try:
        schema = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        walk = _Walk(schema)
        prepared = walk.prepare(schema, "#", 0)
        walk.check_patterns()
        return prepared
    except UserError:
        raise
    except ValueError as error:  # what is no JSON, and an integer of more digits than Python reads
        raise UserError(f"structured_outputs.json is no JSON: {error}") from None
    except RecursionError:
        raise UserError("structured_outputs.json is nested too deeply") from None


class _Walk:
    """One schema; `draft` is None where it names none, and then every keyword of any draft may be used."""

    def __init__(self, root: Any):
        self.draft: int | None = None
        named = root.get("$schema") if isinstance(root, Mapping) else None
        if named is not None:
            self.draft = _DRAFTS.get(named.removesuffix("#") if isinstance(named, str) else "")
            if self.draft is None:
                raise UserError(
                    f"$schema {named!r} is not supported; supported are drafts 4, 6, 7, 2019-09 and 2020-12"
                )
        self._named = named
        self._patterns: set[str] = set()
        self._merges = False

    def check_patterns(self) -> None:
        """Schemas that are merged may ask one string to match all of their patterns."""
        if self._merges and len(self._patterns) > MAX_MERGED_PATTERNS:
            raise UserError(
                "a JSON schema that merges schemas (by allOf, or by $ref, anyOf or oneOf beside other keywords) may "
                f"have at most {MAX_MERGED_PATTERNS} different patterns and formats, got {len(self._patterns)}"
            )

    def prepare(self, schema: Any, where: str, depth: int) -> Any:
        """Returns a schema with its own schemas prepared."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise UserError(f"a JSON schema must be an object, true or false; at {where} is {_show(schema)}")
        if depth > MAX_DEPTH:
            raise UserError(f"a JSON schema may nest {MAX_DEPTH} schemas at most; it is deeper at {where[:60]}...")
        self._check_reference(schema, where)
        asserted = schema.keys() - _ANNOTATIONS - {"$defs", "definitions", "$schema", "$id", "id", "$anchor"}
        self._merges |= "allOf" in asserted or bool(asserted & {"$ref", "anyOf", "oneOf"}) and len(asserted) > 1
        self._patterns |= {str(schema[name]) for name in ("pattern", "format") if name in schema}
        result: dict[str, Any] = {}
        extra: list[Any] = []
        for name, value in schema.items():
            self._check_draft(name, value, where)
            if name in _ANNOTATIONS or name in _CONTENT or (name.startswith("x-") and name != "x-guidance"):
                continue
            place = f"{where}/{name}"
            if name in _SCHEMA or (name == "items" and not isinstance(value, list)):
                result[name] = self.prepare(value, place, depth + 1)
            elif name in _SCHEMA_MAP:
                result[name] = self._prepare_map(name, value, place, depth)
            elif name in _SCHEMA_LIST or name == "items":
                result[name] = self._prepare_list(value, place, depth)
            elif name in _COUNTS:
                result[name] = _count(name, value, schema, place)
            elif name == "pattern":
                result[name] = translate_pattern(_string(value, place), f"the pattern at {place}")
            elif name == "format":
                _add_format(value, place, result, extra)
            elif name in _PLAIN or name == "$ref":
                _check_letters(value if name in ("const", "enum", "required") else None, place)
                result[name] = value
            elif not (name == "uniqueItems" and value is False):
                raise UserError(
                    f"the JSON schema keyword {name!r} at {where} cannot be enforced; remove it, or check its spelling"
                )
        if extra:
            result["allOf"] = [*result.get("allOf", ()), *extra]
        return result

    def _prepare_map(self, name: str, value: Any, place: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise UserError(f"{place} must be an object of JSON schemas, got {_show(value)}")
        _check_letters(list(value), place)
        prepared = {key: self.prepare(schema, f"{place}/{key}", depth + 1) for key, schema in value.items()}
        if name != "patternProperties":
            return prepared
        self._patterns |= value.keys()
        return {translate_pattern(key, f"the pattern at {place}"): schema for key, schema in prepared.items()}

    def _prepare_list(self, value: Any, place: str, depth: int) -> list[Any]:
        if not isinstance(value, list):
            raise UserError(f"{place} must be a list of JSON schemas, got {_show(value)}")
        return [self.prepare(schema, f"{place}/{index}", depth + 1) for index, schema in enumerate(value)]

    def _check_draft(self, name: str, value: Any, where: str) -> None:
        """A keyword means what it means in the draft that the schema names."""
        first, last = _SINCE.get(name, (0, 9999))
        if name == "items" and isinstance(value, list):
            last = 2019
        if self.draft is not None and not first <= self.draft <= last:
            raise UserError(f"the JSON schema keyword {name!r} at {where} cannot be enforced in {self._named}")
        if name == "$schema" and (value != self._named):
            raise UserError(f"a JSON schema may name one $schema; at {where} is {value!r} within {self._named!r}")
        if name == "required" and not isinstance(value, list):
            raise UserError(f"'required' at {where} must be a list of names, got {_show(value)}")

    def _check_reference(self, schema: Mapping[str, Any], where: str) -> None:
        """A reference leads to what is walked here: neither out of the schema nor into a default or an example."""
        if "$ref" not in schema:
            return
        reference = _string(schema["$ref"], f"{where}/$ref")
        base, _, fragment = reference.partition("#")
        if "json-schema.org" in base:
            raise UserError(f"$ref at {where} names {reference!r}; references out of the schema are not supported")
        pointer = unquote(fragment)
        if pointer.startswith("/") and _POINTER_STEP.sub("", pointer):
            raise UserError(f"$ref at {where} names {reference!r}, where no schema stands")
        ignored = sorted(set(schema) - {"$ref"} - _ANNOTATIONS - _SCHEMA_MAP)
        if (
            self.draft is not None
            and self.draft <= 7
            and (ignored or {"properties", "patternProperties"} & set(schema))
        ):
            raise UserError(f"$ref at {where} hides its siblings in {self._named}; put them elsewhere")


def _count(name: str, value: Any, schema: Mapping[str, Any], place: str) -> int:
    is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1 and value >= 0
    if not is_whole:
        raise UserError(f"{place} must be an integer of at least 0, got {_show(value)}")
    required = schema.get("required")
    if name == "minProperties" and value > max(1, len(set(required)) if isinstance(required, list) else 0):
        # A name may be written twice, and then counts once.
        raise UserError(f"minProperties={value} at {place} cannot be enforced beyond the properties that are required")
    return int(value)


def _add_format(value: Any, place: str, result: dict[str, Any], extra: list[Any]) -> None:
    if isinstance(value, str) and value in EXACT:
        result["format"] = value
    elif isinstance(value, str) and value in PATTERNS:
        extra.append({"pattern": PATTERNS[value]})
    else:
        known = ", ".join(sorted({*EXACT, *PATTERNS}))
        raise UserError(f"the format {_show(value)} at {place} cannot be enforced; those that can be are {known}")


def _check_letters(value: Any, place: str) -> None:
    """Refuses control characters that JSON spells by number alone: only one spelling a character is generated."""
    if isinstance(value, str):
        wrong = _CONTROL.search(value)
        if wrong:
            raise UserError(f"the text {_show(value)} at {place} cannot be enforced: it holds {_show(wrong.group())}")
    elif isinstance(value, Mapping):
        _check_letters([*value, *value.values()], place)
    elif isinstance(value, list):
        for item in value:
            _check_letters(item, place)


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place} must be a string, got {_show(value)}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise UserError("structured_outputs.json names a key twice within one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise UserError(f"structured_outputs.json holds {name}, which is no JSON")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
