"""Every limit: what is at it is served, what is above it is refused with the number, before anything is allocated."""

import asyncio
import json
import sys

import pytest
from starlette.testclient import TestClient

from fastgpt_jax.serving import body as body_module
from tests.serving.fake_llm import make_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def post(path, body, **settings):
    llm, app = make_server(**settings)
    return llm, TestClient(app).post(path, json=body)


@pytest.mark.parametrize(
    ("settings", "path", "at_limit", "above", "param"),
    [
        ({"max_prompts": 2}, COMPLETIONS, {"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}, "prompt"),
        ({"max_prompts": 2}, "/v1/embeddings", {"input": ["a"] * 2}, {"input": ["a"] * 3}, "input"),
        ({"max_n": 2}, COMPLETIONS, {"prompt": "a", "n": 2}, {"prompt": "a", "n": 3}, "n"),
        (
            {"max_sequences": 4},
            COMPLETIONS,
            {"prompt": ["a"] * 2, "n": 2},
            {"prompt": ["a"] * 2, "n": 3},
            "n",
        ),
        (
            {"max_stop_strings": 2},
            COMPLETIONS,
            {"prompt": "a", "stop": ["x", "y"]},
            {"prompt": "a", "stop": ["x"] * 3},
            "stop",
        ),
        ({"max_stop_chars": 2}, COMPLETIONS, {"prompt": "a", "stop": "xy"}, {"prompt": "a", "stop": "xyz"}, "stop"),
        (
            {"max_logit_bias": 2},
            COMPLETIONS,
            {"prompt": "a", "logit_bias": {"1": 1, "2": 1}},
            {"prompt": "a", "logit_bias": {"1": 1, "2": 1, "3": 1}},
            "logit_bias",
        ),
        (
            {"max_logit_bias": 2},
            COMPLETIONS,
            {"prompt": "a", "stop_token_ids": [1, 2]},
            {"prompt": "a", "stop_token_ids": [1, 2, 3]},
            "stop_token_ids",
        ),
        (
            {"max_schema_bytes": 18},
            COMPLETIONS,
            {"prompt": "a", "guided_json": {"type": "string"}},
            {"prompt": "a", "guided_json": {"type": "integer"}},
            "guided_json",
        ),
        (
            {"max_schema_bytes": 4},
            COMPLETIONS,
            {"prompt": "a", "guided_regex": "éé"},
            {"prompt": "a", "guided_regex": "ééa"},
            "guided_regex",
        ),
        (
            {"max_messages": 1},
            CHAT,
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{}] * 2},
            "messages",
        ),
        (
            {"max_messages": 1},
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a"}] * 2},
            "messages",
        ),
        ({}, "/detokenize", {"tokens": [65] * 64}, {"tokens": [65] * 65}, "tokens"),
        (
            {},
            "/tokenize",
            {"prompt": "a" * 64, "return_token_strs": True},
            {"prompt": "a" * 65, "return_token_strs": True},
            "return_token_strs",
        ),
        ({}, COMPLETIONS, {"prompt": "a", "logprobs": 5}, {"prompt": "a", "logprobs": 6}, "logprobs"),
        (
            {},
            COMPLETIONS,
            {"prompt": "a", "prompt_logprobs": 5},
            {"prompt": "a", "prompt_logprobs": 6},
            "prompt_logprobs",
        ),
    ],
)
def test_one_more_than_may_be_is_refused_with_the_number(settings, path, at_limit, above, param):
    assert post(path, at_limit, **settings)[1].status_code == 200
    llm, response = post(path, above, **settings)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "limit_exceeded", param)
    assert str(next(iter(settings.values()), 64 if path.endswith("tokenize") else 5)) in error["message"]
    assert not llm.asked


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-1] * 1000}, "stop_token_ids[0]"),
        (COMPLETIONS, {"prompt": "a", "guided_choice": [1] * 1000}, "guided_choice[0]"),
        (COMPLETIONS, {"prompt": "a", "structured_outputs": {"choice": [1] * 1000}}, "structured_outputs.choice[0]"),
        (CHAT, {"messages": [{}] * 1000}, "messages[0].role"),
        (CHAT, {"messages": [dict.fromkeys(map(str, range(1000)), 1)]}, "messages[0]"),
        (COMPLETIONS, {"prompt": "a", **dict.fromkeys(map(str, range(1000)), 1)}, None),
        ("/detokenize", {"tokens": [1], **dict.fromkeys(map(str, range(1000)), 1)}, None),
    ],
)
def test_of_many_mistakes_few_are_looked_for(path, body, param, monkeypatch):
    counts = []

    def count(details):
        counts.append(sys.exception().error_count())
        return told(details)

    told = body_module._field_error
    monkeypatch.setattr(body_module, "_field_error", count)
    response = post(path, body)[1]
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert counts[0] <= 4


def test_a_body_may_have_so_many_bytes():
    body = {"prompt": "a"}
    size = len(json.dumps(body, separators=(",", ":")))
    assert post(COMPLETIONS, body, max_body_bytes=size)[1].status_code == 200
    response = post(COMPLETIONS, body, max_body_bytes=size - 1)[1]
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("headers", "num_received"),
    [
        ([(b"content-length", b"1000000")], 0),
        ([(b"content-length", b"9" * 5000)], 0),
        ([], 3),
        ([(b"content-length", b"1")], 3),
        ([(b"content-length", "²".encode("latin-1"))], 3),
    ],
)
def test_a_body_too_large_is_not_read_to_its_end(headers, num_received):
    _, app = make_server(max_body_bytes=25)
    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETIONS,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    received, sent = 0, []

    async def receive():
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and received == num_received
    assert (b"connection", b"close") not in sent[0]["headers"], "a client that still writes would lose the answer"


def test_a_body_must_come_in_time():
    _, app = make_server(body_timeout_s=0.05)
    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETIONS,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    sent = []

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 2))
    assert sent[0]["status"] == 400 and b"body_timeout" in sent[1]["body"]


def test_headers_may_have_so_many_bytes():
    client = TestClient(make_server(max_header_bytes=1000)[1])
    assert client.get("/v1/models", headers={"x-long": "x" * 500}).status_code == 200
    response = client.get("/v1/models", headers={"x-long": "x" * 1000})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "headers_too_large")
