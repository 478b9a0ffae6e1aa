"""The server against documents of its API: OpenAI's, cut to what is served here, and its own."""

from __future__ import annotations

import json
import re
from collections import Counter

import hypothesis
import pytest
import yaml
from fastapi.routing import iter_route_contexts
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from fastgpt_jax.serving.protocol_chat import UNSUPPORTED_CHAT
from fastgpt_jax.serving.protocol_completions import UNSUPPORTED_COMPLETIONS
from tests.serving.fake_llm import FakeLLM, make_server
from tests.shared_data import shared_path

SERVED = {
    "/completions": ("post",),
    "/chat/completions": ("post",),
    "/embeddings": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
}
OWN = ("/tokenize", "/detokenize", "/load", "/health", "/health/live", "/health/ready", "/metrics")
ERRORS = (400, 401, 404, 413, 429, 503, 504)
MAX_EXAMPLES = 30
STREAMED = ("model", "prompt", "messages", "temperature", "presence_penalty", "frequency_penalty", "stop", "user")
ERROR = {"$ref": "#/components/schemas/ErrorResponse"}


@pytest.fixture(scope="module")
def own_document():
    return TestClient(make_server()[1]).get("/openapi.json").json()


def test_the_document_lists_every_route_with_what_it_takes_gives_and_how_it_errs(own_document):
    _, app = make_server()
    routes = {(context.path, method) for context in iter_route_contexts(app.routes) for method in context.methods}
    listed = {(path, method.upper()) for path, operations in own_document["paths"].items() for method in operations}
    assert {(re.sub(r":path\}", "}", path), method) for path, method in routes} == listed
    for path, operations in own_document["paths"].items():
        for method, operation in operations.items():
            assert "200" in operation["responses"], path
            if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
                for status in ("401", "413") + (("400", "404") if method == "post" else ()):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
                assert (method == "post") == ("requestBody" in operation), path
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        assert {"429", "503", "504"} <= set(own_document["paths"][path]["post"]["responses"])


def test_every_reference_of_the_document_leads_somewhere(own_document):
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(own_document)))
    assert names <= set(own_document["components"]["schemas"]) and len(names) > 20
    for schema in own_document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_the_document_says_where_a_key_is_needed():
    _, app = make_server(api_keys=("k",))
    client = TestClient(app)
    assert client.get("/openapi.json").status_code == 401
    document = client.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert document["paths"]["/health/live"]["get"]["security"] == []


def cut_document(own):
    """OpenAI's document: our routes and methods, our errors, our own routes, and what its own servers do besides."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = yaml.load(shared_path("suites/openai-openapi.yaml").read_text(), loader)
    paths = {}
    for path, methods in SERVED.items():
        paths["/v1" + path] = {method: document["paths"][path][method] for method in methods}
    for path in OWN:
        paths[path] = own["paths"][path]
    schemas = document["components"]["schemas"]
    answer = {"description": "An error", "content": {"application/json": {"schema": ERROR}}}
    for operations in paths.values():
        for operation in operations.values():
            operation.pop("x-oaiMeta", None)
            responses = operation["responses"]
            responses |= {str(status): answer for status in ERRORS if str(status) not in responses}
    # What OpenAI's own servers answer, and its document leaves out.
    completion = schemas["CreateCompletionResponse"]
    told = completion["properties"]["choices"]["items"]["properties"]["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):  # of the first token of an echoed prompt
        told[name]["items"] = {"anyOf": [told[name]["items"], {"type": "null"}]}
    reason = completion["properties"]["choices"]["items"]["properties"]["finish_reason"]
    reason["nullable"] = True  # in chunks before the last
    schemas["Embedding"]["properties"]["embedding"] = {
        "anyOf": [schemas["Embedding"]["properties"]["embedding"], {"type": "string"}]  # base64
    }
    for path, chunk in (
        ("/v1/completions", "CreateCompletionResponse"),
        ("/v1/chat/completions", "CreateChatCompletionStreamResponse"),
    ):
        paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {"schema": event_schema(chunk)}
    for name in ("CreateCompletionRequest", "CreateEmbeddingRequest"):
        schemas[name]["properties"]["model"] = {"type": "string", "enum": ["fake"]}
    schemas["ModelIdsShared"] = {"type": "string", "enum": ["fake"]}
    schemas |= own["components"]["schemas"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "cut", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": with_nulls(needed_schemas(paths, schemas)),
            "responses": document["components"]["responses"],
        },
    }


def event_schema(chunk):
    """One event of a stream; a finish reason is null until the last."""
    content = {"contentMediaType": "application/json", "contentSchema": {"$ref": f"#/components/schemas/{chunk}"}}
    data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", **content}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def with_nulls(schema):
    """The document calls itself 3.1 and says `nullable`, as 3.0 did."""
    if isinstance(schema, list):
        return [with_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: with_nulls(value) for name, value in schema.items()}
    if changed.pop("nullable", False) is True:
        return {"anyOf": [changed, {"type": "null"}]}
    return changed


def needed_schemas(paths, schemas):
    """The schemas that the paths refer to, directly or not."""
    needed, left = {}, [paths, {"$ref": "#/components/schemas/ErrorResponse"}]
    while left:
        for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(left.pop(), default=str)):
            if name not in needed:
                needed[name] = schemas[name]
                left.append(schemas[name])
    return needed


def lead_to_an_answer(case, is_stream):
    """Drops what is always refused: of the rest of OpenAI's document enough is left to be wrong."""
    if isinstance(case.body, dict) and case.path.endswith("completions"):
        names = {*UNSUPPORTED_CHAT, *UNSUPPORTED_COMPLETIONS, "stream_options", "response_format", "deadline_s"}
        case.body = {name: value for name, value in case.body.items() if name not in names}
        if is_stream:  # what has a range of its own is left to the others, since there are too few answers else
            case.body = {name: value for name, value in case.body.items() if name in STREAMED}
        case.body |= {"stream": is_stream, "max_tokens": 3}
        if isinstance(case.body.get("messages"), list):
            case.body["messages"] = [
                {"role": "user", "content": message["content"]}
                for message in case.body["messages"]
                if isinstance(message, dict) and isinstance(message.get("content"), str)
            ] or [{"role": "user", "content": "hi"}]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["openai", "own"])
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_no_request_breaks_the_server_or_the_document(which, kind, own_document):
    import schemathesis  # noqa: PLC0415 - takes seconds
    from schemathesis.specs.openapi import checks  # noqa: PLC0415

    _, app = make_server(FakeLLM(max_model_len=512))
    schema = schemathesis.openapi.from_dict(cut_document(own_document) if which == "openai" else own_document)
    schema.app = app
    wanted = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    if (which, kind) == ("own", "negative"):
        wanted.append(checks.negative_data_rejection)
    seen: list[tuple[int, str]] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if kind == "negative" and not operation.body:
            continue

        @hypothesis.settings(
            max_examples=MAX_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(kind)))
        def check(case):
            if kind == "positive" and len(seen) % 3:
                lead_to_an_answer(case, is_stream=len(seen) % 3 == 2)
            response = case.call()
            seen.append((response.status_code, response.headers["content-type"][0].split(";")[0]))
            case.validate_response(response, checks=wanted)

        check()
    statuses = Counter(status for status, _ in seen)
    assert statuses[400] > 25
    assert kind == "negative" or (statuses[200] > 20 and seen.count((200, "text/event-stream")) > 5)
