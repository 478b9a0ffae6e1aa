"""JSON schemas: enforced as JSON-Schema-Test-Suite and another validator say, or refused by keyword and place."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest

from benchmarks.structured_output_table import DRAFTS, is_accepted, judge, make_compiler, read_suite
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from tests.sampling.random_schemas import RandomSchemas
from tests.sampling.walk import walk
from tests.shared_data import shared_path

SUITE = "suites/JSON-Schema-Test-Suite.tar.gz"
NARROWER = {
    *("optional/format/hostname", "optional/format/ipv6", "optional/format/time", "optional/format/date-time"),
    *("optional/format/email", "optional/ecmascript-regex", "format"),
    # Draft 4's 1.0 is no integer, and has one spelling in the test.
    *("enum", "optional/float-overflow"),
}
"""Files of the suite with valid instances that are never generated; docs/structured_output.md says which."""

SERVED = {"type", "properties", "required", "items", "enum", "const", "pattern", "minimum", "anyOf", "ref", "maxLength"}
"""Files whose schemas must be enforced for the most part."""


@pytest.fixture(scope="module")
def compiler():
    return make_compiler()


@pytest.mark.parametrize(
    "draft", ["draft2020-12", *(pytest.param(draft, marks=pytest.mark.slow) for draft in list(DRAFTS)[1:])]
)
def test_every_schema_of_the_suite_is_enforced_or_refused(compiler, draft):
    outcomes = [
        outcome
        for name, keyword, cases in read_suite(shared_path(SUITE), [draft])
        for case in cases
        for outcome in judge(compiler, name, keyword, case)
    ]
    assert [outcome for outcome in outcomes if outcome.kind == "wrongly accepted"] == []
    assert {outcome.keyword for outcome in outcomes if outcome.kind == "wrongly rejected"} <= NARROWER
    assert all("\n" not in outcome.message and len(outcome.message) < 500 for outcome in outcomes)
    for keyword in SERVED & {outcome.keyword for outcome in outcomes}:
        kinds = [outcome.kind for outcome in outcomes if outcome.keyword == keyword]
        assert kinds.count("refused") * 4 < len(kinds), keyword


VALIDATORS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft4": jsonschema.Draft4Validator,
}
OTHER_READINGS = {"optional/ecmascript-regex", "multipleOf"}
"""Python reads some patterns in another way than ECMA-262, and rounds quotients of decimal fractions."""


@pytest.mark.slow
def test_whatever_is_drawn_satisfies_the_suites_schemas(compiler):
    rng = np.random.default_rng(0)
    seen, num_checked = set(), 0
    for draft, keyword, cases in read_suite(shared_path(SUITE)):
        for case in cases:
            text = json.dumps(case["schema"])
            if (
                keyword in OTHER_READINGS
                or "http:" in text
                or "\\\\p" in text
                or (draft, text) in seen
                or case["schema"] is True
            ):
                continue
            seen.add((draft, text))
            schema = case["schema"] and {"$schema": DRAFTS[draft], **case["schema"]}
            params = StructuredOutputsParams(json=schema)
            try:
                compiler.compile(params)
            except UserError:
                continue
            validator = VALIDATORS[draft](schema, format_checker=VALIDATORS[draft].FORMAT_CHECKER)
            for num_tokens in (3, 12, 30):
                instance = json.loads(bytes(walk(params, compiler, rng, num_tokens=num_tokens)))
                assert validator.is_valid(instance), (schema, instance)
                num_checked += 1
    assert num_checked > 500


@pytest.mark.slow
def test_whatever_is_drawn_satisfies_random_schemas(compiler):
    rng, schemas = np.random.default_rng(0), RandomSchemas(0)
    num_checked = num_refused = 0
    for _ in range(1500):
        schema = schemas.draw()
        params = StructuredOutputsParams(json=schema)
        try:
            compiler.compile(params)
        except UserError:
            num_refused += 1
            continue
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for num_tokens in (2, 10, 30):
            ids = walk(params, compiler, rng, num_tokens=num_tokens, must_end=False)
            if ids is not None:
                assert validator.is_valid(json.loads(bytes(ids))), (schema, bytes(ids))
                num_checked += 1
    assert num_checked > 1500 and num_refused < 1000


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "day": {"type": "string", "format": "date"},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["day", "tags", "left"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def test_a_recursive_schema_is_enforced(compiler):
    validator = jsonschema.Draft202012Validator(TREE, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    rng = np.random.default_rng(4)
    for _ in range(15):
        text = bytes(walk(StructuredOutputsParams(json=TREE), compiler, rng, num_tokens=60))
        assert validator.is_valid(json.loads(text)), text


def nest(schema):
    """The same demand at four depths: as it is, in a property, in a list, and behind a reference."""
    inner = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return [schema, inner, {"type": "array", "items": schema}, {"$defs": {"a/b": schema}, "$ref": "#/$defs/a~1b"}]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "the JSON schema keyword 'not' at "),
        ({"type": "string", "maxLenght": 3}, "the JSON schema keyword 'maxLenght' at "),
        ({"uniqueItems": True}, "'uniqueItems'"),
        ({"disallow": "integer"}, "'disallow'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"type": "string", "format": "int64"}, 'the format "int64" at '),
        ({"minProperties": 2}, "beyond the properties that are required"),
        ({"minItems": -1}, "an integer of at least 0"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "pattern": r"\cA"}, r"\c"),
        ({"type": "string", "pattern": "^a\\x01b$"}, "control character"),
        ({"const": "a\u0000b"}, "cannot be enforced: it holds"),
        ({"properties": {"a\u0001": {}}}, "cannot be enforced: it holds"),
        ({"$ref": "#/default", "default": {"not": {}}}, "where no schema stands"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "references out of the schema"),
        ({"$ref": "http://elsewhere.example/x.json"}, "cannot be enforced"),
        ({"properties": [1]}, "must be an object of JSON schemas"),
        ({"anyOf": {"a": 1}}, "must be a list of JSON schemas"),
        ({"items": 3}, "must be an object, true or false"),
        ({"required": True}, "must be a list of names"),
        ({"allOf": [{"pattern": f"a{{{n}}}"} for n in range(9)]}, "at most 8 different patterns"),
        ({"anyOf": [{"pattern": "a"}] * 9, "pattern": "b", "$defs": {str(n): {"pattern": str(n)} for n in range(9)}},)
        + ("at most 8 different patterns",),
    ],
)
def test_what_cannot_be_enforced_is_named_at_any_depth(compiler, schema, message):
    for whole in nest(schema):
        with pytest.raises(UserError) as error:
            compiler.compile(StructuredOutputsParams(json=whole))
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "supported are drafts 4, 6, 7"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": []}, "'prefixItems'"),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "items": [{}]}, "'items'"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, "'const'"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/a", "maxItems": 1}
            | {"definitions": {"a": {}}},
            "hides its siblings",
        ),
    ],
)
def test_a_keyword_means_what_its_draft_says(compiler, schema, message):
    with pytest.raises(UserError, match=message):
        compiler.compile(StructuredOutputsParams(json=schema))


@pytest.mark.parametrize(
    ("pattern", "accepted", "rejected"),
    [
        (r"^\s$", ["\ufeff", "\u2028", " "], ["a", "\u200b"]),
        (r"^\S$", ["a", "\u200b"], ["\ufeff", " "]),
        (r"^\d$", ["3"], ["\u0663"]),
        (r"^\w$", ["a", "_"], ["é"]),
        (r"^[\W]$", ["é", "-"], ["a"]),
        (r"^.$", ["a", "\u0085"], ["\u2028", "\n", "\r"]),
        (r"^[[]$", ["["], ["]"]),
        (r"^[a&&b]$", ["a", "&", "b"], ["c"]),
        (r"b", ["b", "abc"], ["ac"]),
        (r"^\u00e9$", ["é"], ["e"]),
        (r"^\p{Lu}$", ["É"], ["é"]),
        (r"^(?<year>\d{4})$", ["2020"], ["20"]),
        (r"^[a\-z]$", ["-", "z"], ["b"]),
    ],
)
def test_patterns_mean_what_ecma_262_says(compiler, pattern, accepted, rejected):
    params = StructuredOutputsParams(json={"type": "string", "pattern": pattern})
    found = {
        text: is_accepted(compiler, params, json.dumps(text, ensure_ascii=False).encode())
        for text in (*accepted, *rejected)
    }
    assert found == {**dict.fromkeys(accepted, True), **dict.fromkeys(rejected, False)}


def test_many_patterns_are_fine_where_no_string_must_match_them_all(compiler):
    schema = {"type": "object", "properties": {str(n): {"pattern": f"^{n}"} for n in range(30)}, "required": ["3"]}
    params = StructuredOutputsParams(json={**schema, "additionalProperties": False})
    assert is_accepted(compiler, params, b'{"3":"3x"}') and not is_accepted(compiler, params, b'{"3":"x3"}')


def test_what_says_nothing_of_instances_changes_nothing(compiler):
    schema = {"type": "string", "title": "t", "description": "d", "default": 3, "examples": [1], "x-order": 1}
    params = StructuredOutputsParams(json={**schema, "deprecated": True, "uniqueItems": False, "$comment": "c"})
    assert is_accepted(compiler, params, b'"a"') and not is_accepted(compiler, params, b"3")
