"""Answers that are the same every time are given again, to whom they belong, for as long as they are kept."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse

from fastgpt_jax.serving.auth import Keys, RequireKey
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.result_cache import CacheResults, ResultCache, _Recorder, is_deterministic
from fastgpt_jax.serving.settings import ServerSettings

GREEDY = {"prompt": "a", "temperature": 0}


class Watched:
    is_ready = True


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def served():
    """A client of a cached application that counts how often it is asked; and its parts."""
    clock, watched, asked = Clock(), Watched(), []
    cache = ResultCache(ttl_s=10.0, max_bytes=16_000, clock=clock)
    settings = ServerSettings(max_body_bytes=1000)
    keys = Middleware(RequireKey, keys=Keys(("one", "two")), open_metrics=False)
    kept = Middleware(CacheResults, cache=cache, settings=settings, model_digest="d1", watched=watched)
    app = FastAPI(middleware=[keys, kept])

    @app.post("/v1/completions")
    async def completions(request: Request):
        fields = await request.json()
        asked.append(fields)
        if fields.get("fails"):
            return JSONResponse({"error": {}}, 400)
        if fields.get("stream"):
            return StreamingResponse(events(fields), media_type="text/event-stream")
        return JSONResponse({"number": len(asked), "text": "x" * fields.get("length", 1)}, headers={"x-own": "kept"})

    async def events(fields):
        yield b'data: {"id": 1}\n\n'
        yield b'data: {"error": {}}\n\n' if fields.get("breaks") else b'data: {"id": 2}\n\n'
        yield b"data: [DONE]\n\n"

    client = TestClient(app, headers={"authorization": "Bearer one"})
    client.parts = cache, clock, watched, asked
    return client


def ask(client, fields=GREEDY, path="/v1/completions", **options) -> httpx.Response:
    return client.post(path, json=fields, **options)


def test_the_second_answer_is_the_first(served):
    first, second = ask(served), ask(served, dict(reversed(GREEDY.items())))
    assert (first.headers["x-fastgpt-cache"], second.headers["x-fastgpt-cache"]) == ("miss", "hit")
    assert first.content == second.content and second.headers["x-own"] == "kept" and len(served.parts[3]) == 1


@pytest.mark.parametrize(
    "fields", [{"prompt": "b", "temperature": 0}, {**GREEDY, "max_tokens": 3}, {**GREEDY, "stream": True}]
)
def test_another_request_has_another_answer(served, fields):
    ask(served)
    assert ask(served, fields).headers["x-fastgpt-cache"] == "miss"


def test_another_key_has_another_answer_and_none_has_none(served):
    ask(served)
    assert ask(served, headers={"authorization": "Bearer two"}).headers["x-fastgpt-cache"] == "miss"
    answer = ask(served, headers={"authorization": "Bearer three"})
    assert answer.status_code == 401 and "x-fastgpt-cache" not in answer.headers


def test_what_may_differ_is_not_kept(served):
    for fields in ({"prompt": "a"}, {"prompt": "a", "temperature": 0.5}, {"prompt": "a", "temperature": 1, "seed": -1}):
        assert [ask(served, fields).json()["number"] for _ in range(2)] == [
            len(served.parts[3]) - 1,
            len(served.parts[3]),
        ]
    assert len(served.parts[0]) == 0


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/completions", {"temperature": 0.0}, True),
        ("/v1/chat/completions", {"temperature": 1, "seed": 7}, True),
        ("/v1/completions", {"seed": None}, False),
        ("/v1/completions", {"temperature": False}, False),
        ("/v1/completions", {"temperature": "0"}, False),
        ("/v1/completions", {"seed": True}, False),
        ("/v1/embeddings", {"input": "a"}, True),
    ],
)
def test_which_requests_have_one_answer(path, fields, expected):
    assert is_deterministic(path, fields) is expected


def test_failures_are_not_kept(served):
    for fields in ({**GREEDY, "fails": True}, {**GREEDY, "stream": True, "breaks": True}):
        ask(served, fields)
        assert ask(served, fields).headers["x-fastgpt-cache"] == "miss"
    assert len(served.parts[0]) == 0


def test_a_stream_is_given_again_whole(served):
    fields = {**GREEDY, "stream": True}
    first, second = ask(served, fields), ask(served, fields)
    assert second.headers["x-fastgpt-cache"] == "hit" and first.content == second.content
    assert second.headers["content-type"] == first.headers["content-type"] and second.text.endswith("[DONE]\n\n")


def test_answers_grow_old(served):
    _, clock, _, _ = served.parts
    ask(served)
    clock.now_s += 9.9
    assert ask(served).headers["x-fastgpt-cache"] == "hit"
    clock.now_s += 0.2
    assert ask(served).headers["x-fastgpt-cache"] == "miss"


def test_the_size_is_bounded_and_what_was_used_longest_ago_leaves(served):
    cache = served.parts[0]
    requests = [{**GREEDY, "prompt": str(index), "length": 1000} for index in range(12)]
    for fields in requests:
        ask(served, fields)
        assert ask(served, requests[0]).headers["x-fastgpt-cache"] == "hit"
        assert cache.nbytes <= 16_000
    assert ask(served, requests[0]).headers["x-fastgpt-cache"] == "hit"
    assert ask(served, requests[1]).headers["x-fastgpt-cache"] == "miss"
    before = len(cache)
    ask(served, {**GREEDY, "length": 3000})
    assert len(cache) == before, "an answer that would take most of the room is not kept"


@pytest.mark.parametrize("headers", [[], [(b"transfer-encoding", b"chunked")]])
def test_a_body_longer_than_it_says_is_not_read_to_its_end(served, headers):
    cache, _, watched, _ = served.parts
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"10"), *headers],
    }
    num_received = 0

    async def receive():
        nonlocal num_received
        num_received += 1
        assert num_received < 20, "it reads on"
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def read_one(scope, receive, send):
        await receive()

    app = CacheResults(
        read_one, cache=cache, settings=ServerSettings(max_body_bytes=1000), model_digest="d", watched=watched
    )
    if headers:
        asyncio.run(app(scope, receive, receive))
        assert num_received == 1, "it goes on unread, to the route that counts"
    else:
        with pytest.raises(ApiError) as told:
            asyncio.run(app(scope, receive, receive))
        assert told.value.code == "body_too_large" and num_received == 11


def test_no_more_of_an_answer_is_held_than_may_be_kept():
    async def send(message):
        pass

    async def record(status, num_chunks):
        recorder = _Recorder(send, 100)
        await recorder({"type": "http.response.start", "status": status, "headers": []})
        for index in range(num_chunks):
            await recorder({"type": "http.response.body", "body": b"x" * 50, "more_body": index < num_chunks - 1})
        return recorder.is_whole, len(recorder.body)

    asked = [(200, 2), (200, 3), (400, 2)]
    assert [asyncio.run(record(*case)) for case in asked] == [(True, 100), (False, 0), (False, 0)]


def test_nothing_is_given_while_nothing_is_taken(served):
    ask(served)
    served.parts[2].is_ready = False
    assert "x-fastgpt-cache" not in ask(served).headers and len(served.parts[3]) == 2


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"temperature": NaN}', b'{"x": "' + b"a" * 2000 + b'"}'])
def test_what_is_no_request_goes_on_as_it_came(served, body):
    @served.app.exception_handler(Exception)
    async def tell(request, error):
        return JSONResponse({}, 400)

    client = TestClient(served.app, headers=served.headers, raise_server_exceptions=False)
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert "x-fastgpt-cache" not in answer.headers and served.parts[0].num_misses == 0


def test_it_says_how_it_does(served):
    ask(served), ask(served)
    registry = CollectorRegistry()
    registry.register(served.parts[0])
    text = generate_latest(registry).decode()
    assert "fastgpt_result_cache_hits_total 1.0" in text and "fastgpt_result_cache_misses_total 1.0" in text
