"""Whatever goes wrong is answered in OpenAI's form: four fields, the right status, no traceback."""

import json
import logging

import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.errors import CODES, ApiError, as_api_error
from fastgpt_jax.serving.protocol import ErrorAnswer
from fastgpt_jax.serving.unavailable import Aborted, Draining, EngineDead, Overloaded, StepFailed
from tests.serving.fake_llm import make_server

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client():
    return TestClient(make_server()[1], raise_server_exceptions=False)


def refusal(response, status, code):
    """The error object; checks all that every error has."""
    body = response.json()
    ErrorAnswer.model_validate(body, strict=True, extra="forbid")
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (response.status_code, body["error"]["code"]) == (status, code), body
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert "Traceback" not in response.text and "Error(" not in response.text
    return body["error"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": Infinity}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_json"),
        (b'{"prompt": "a", "metadata": {"a": [-1e999]}}', "invalid_json"),
        (b'{"prompt": "a", "metadata": ' + b"[" * 64 + b"]" * 64 + b"}", "limit_exceeded"),
        (b'{"prompt": ' + b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "a"} x', "invalid_json"),
    ],
)
def test_a_body_that_is_no_sound_json_is_refused(client, content, code):
    refusal(client.post(COMPLETIONS, content=content, headers=JSON), 400, code)


def test_the_deepest_body_that_may_be_is_read():
    client = TestClient(make_server(max_json_depth=3)[1])
    body = {"prompt": "a", "max_tokens": 1, "guided_json": {"properties": {}}}
    assert client.post(COMPLETIONS, json=body).status_code == 200
    body["guided_json"]["properties"]["a"] = {}
    refusal(client.post(COMPLETIONS, json=body), 400, "limit_exceeded")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_a_body_of_another_kind_is_refused(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    refusal(client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers), 400, "unsupported_media_type")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": 1}, "invalid_type", "prompt"),
        ({"prompt": []}, "invalid_type", "prompt"),
        ({"prompt": [[]]}, "invalid_type", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt"),
        ({"prompt": [True]}, "invalid_type", "prompt"),
        ({"prompt": [1.0]}, "invalid_type", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [258]}, "invalid_value", "prompt"),
        ({"prompt": [10**30]}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 10**30}, "invalid_value", "top_k"),
        ({"min_p": 2}, "invalid_value", "min_p"),
        ({"typical_p": 0}, "invalid_value", "typical_p"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 1.5}, "invalid_type", "n"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"stop": 1}, "invalid_type", "stop"),
        ({"stop": ["a", None]}, "invalid_type", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
        ({"stop_token_ids": [258]}, "invalid_value", "stop_token_ids"),
        ({"logit_bias": []}, "invalid_type", "logit_bias"),
        ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": "1"}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"258": 1}}, "invalid_value", "logit_bias"),
        ({"logprobs": 6}, "limit_exceeded", "logprobs"),
        ({"prompt_logprobs": 6}, "limit_exceeded", "prompt_logprobs"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"padding": 1}}, "unsupported_parameter", "stream_options.padding"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": 0}},
            "invalid_type",
            "stream_options.include_obfuscation",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_parameter",
            "stream_options.include_obfuscation",
        ),
        ({"structured_outputs": {"json_object": 1}}, "invalid_type", "structured_outputs.json_object"),
        ({"structured_outputs": {"json_object": False}}, "invalid_value", "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
        ({"guided_regex": "a", "guided_json": {}}, "invalid_value", "guided_json"),
        ({"guided_regex": "a", "structured_outputs": {"json": {}}}, "invalid_value", "guided_regex"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"guided_json": 3}, "invalid_value", "guided_json"),
        ({"deadline_s": 0}, "invalid_value", "deadline_s"),
        ({"priority": 2**63}, "invalid_value", "priority"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"store": 0}, "unsupported_parameter", "store"),
        ({"colour": 1}, "unsupported_parameter", "colour"),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
    ],
)
def test_a_wrong_field_is_named(client, fields, code, param):
    error = refusal(client.post(COMPLETIONS, json={"prompt": "hi", **fields}), 400, code)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field", ["tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "modalities", "prediction"]
)
def test_what_a_chat_does_not_do_yet_is_refused(client, field):
    error = refusal(
        client.post(CHAT, json={"messages": HI, field: [{"type": "function"}]}), 400, "unsupported_parameter"
    )
    assert error["param"] == field
    neutral = {"tools": [], "tool_choice": "none", "modalities": ["text"]}
    assert client.post(CHAT, json={"messages": HI, "max_tokens": 1, **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "invalid_value", "messages"),
        ("hi", "invalid_type", "messages"),
        (["hi"], "invalid_type", "messages"),
        ([{"content": "hi"}], "missing_required_parameter", "messages[0].role"),
        ([{"role": "user"}], "missing_required_parameter", "messages[0].content"),
        ([*HI, {"role": "wizard", "content": "hi"}], "invalid_value", "messages[1].role"),
        ([{"role": "user", "content": 1}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "invalid_type", "messages[0].content"),
    ],
)
def test_a_wrong_message_is_named(client, messages, code, param):
    assert refusal(client.post(CHAT, json={"messages": messages}), 400, code)["param"] == param


@pytest.mark.parametrize("dimensions", [1, 2, 1024])
def test_embeddings_are_not_cut_short(client, dimensions):
    body = {"input": "a", "dimensions": dimensions}
    assert refusal(client.post("/v1/embeddings", json=body), 400, "unsupported_parameter")["param"] == "dimensions"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/embeddings", "/tokenize", "/detokenize"])
def test_another_model_is_not_found(client, path):
    fields = {"prompt": "a"} if path in (COMPLETIONS, "/tokenize") else {"input": "a"}
    fields = {"messages": HI} if path == CHAT else {"tokens": [1]} if path == "/detokenize" else fields
    error = refusal(client.post(path, json={"model": "gpt-4", **fields}), 404, "model_not_found")
    assert error["param"] == "model" and "fake" in error["message"]
    refusal(client.get("/v1/models/gpt-4"), 404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * 64}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 60, "max_tokens": 5}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", "x" * 70]}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 64, "max_tokens": 0}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 60}]}, "messages"),
        (CHAT, {"messages": HI, "max_completion_tokens": 60}, "messages"),
        ("/v1/embeddings", {"input": "x" * 64}, "input"),
    ],
)
def test_a_context_too_long_has_its_own_code(client, path, body, param):
    assert refusal(client.post(path, json=body), 400, "context_length_exceeded")["param"] == param
    assert client.post(COMPLETIONS, json={"prompt": "x" * 60, "max_tokens": 4}).status_code == 200


def test_what_is_not_there_is_said_in_the_same_form(client):
    for method, path in (("GET", "/nope"), ("POST", "/v1/responses"), ("GET", "/v1/models/"), ("POST", "/v1")):
        refusal(
            client.request(method, path, json={}), 404, "model_not_found" if "models" in path else "route_not_found"
        )
    response = client.get(COMPLETIONS)
    refusal(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (UserError("n must be odd"), 400, "invalid_value", None),
        (Overloaded("busy", 7), 429, "overloaded", "7"),
        (Draining("going"), 503, "draining", "1"),
        (Aborted("ended"), 503, "draining", "1"),
        (EngineDead("gone"), 503, "engine_stopped", None),
        (StepFailed("a step failed"), 500, "step_failed", None),
        (RuntimeError("secret of ours"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_the_engine_raises_has_its_status(error, status, code, retry_after, is_stream):
    llm, app = make_server()
    llm.error = error
    client = TestClient(app, raise_server_exceptions=False)
    response = client.post(COMPLETIONS, json={"prompt": "a", "stream": is_stream})
    told = refusal(response, status, code)
    assert response.headers.get("retry-after") == retry_after and "secret" not in response.text
    assert code != "internal_error" or "log" in told["message"]
    response = client.post("/v1/embeddings", json={"input": "a"})
    refusal(response, status, code)


def test_the_log_alone_has_the_traceback(caplog):
    llm, app = make_server()
    llm.error = RuntimeError("secret of ours")
    with caplog.at_level(logging.ERROR):
        response = TestClient(app).post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "mine"})
    refusal(response, 500, "internal_error")
    assert "secret of ours" in caplog.text and "mine" in caplog.text


@pytest.mark.parametrize("error", [StepFailed("a step failed"), RuntimeError("secret of ours")])
def test_an_error_within_a_stream_is_an_event(error):
    llm, app = make_server()
    llm.error, llm.error_after = error, 2
    response = TestClient(app).post(CHAT, json={"messages": HI, "stream": True})
    *events, last, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and len(events) == 3
    body = json.loads(last.removeprefix("data: "))
    ErrorAnswer.model_validate(body, extra="forbid")
    assert body["error"]["code"] in ("step_failed", "internal_error") and "secret" not in response.text


@pytest.mark.parametrize(
    ("reason", "status", "code"), [("deadline", 504, "deadline_exceeded"), ("abort", 503, "draining")]
)
def test_what_ended_before_its_time_is_no_answer(reason, status, code):
    llm, app = make_server()
    llm.ends_with = reason
    client = TestClient(app)
    refusal(client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 4}), status, code)
    refusal(client.post(CHAT, json={"messages": HI, "max_tokens": 4}), status, code)
    events = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 4, "stream": True}).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == code and len(events) == 6


@pytest.mark.parametrize(("field", "code"), [("is_draining", "draining"), ("is_ready", "not_ready")])
def test_nothing_is_read_while_nothing_is_taken(field, code):
    llm, app = make_server()
    setattr(llm, field, field == "is_draining")
    client = TestClient(app)
    for path in (COMPLETIONS, CHAT, "/v1/embeddings"):
        response = client.post(path, content=b"{", headers=JSON)
        refusal(response, 503, code)
        assert response.headers["retry-after"] == "1"


def test_every_code_is_a_code_of_ours_and_every_status_one_that_is_documented():
    for code, kind in CODES.items():
        assert kind.status in (400, 401, 404, 405, 409, 413, 429, 500, 503, 504)
        body = ApiError(code, "x").body()
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert as_api_error(KeyError("x")).code == "internal_error"


def test_a_route_that_breaks_is_answered_too():
    router = APIRouter()

    @router.get("/breaks")
    async def breaks():
        raise ZeroDivisionError("secret of ours")

    app = make_server(routers=[router])[1]
    refusal(TestClient(app).get("/breaks"), 500, "internal_error")
