"""Everything needs a key but what is on a short list; nothing is read before the key is seen."""

import asyncio
import re

import pytest
from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving import auth
from fastgpt_jax.serving.auth import Keys, load_api_keys
from tests.serving.fake_llm import make_server

KEYS = ("sk-first", "sk-second")


def header(key):
    return {"authorization": f"Bearer {key}"}


def routes_of(app):
    """Path and method of every route, a parameter filled in."""
    for context in iter_route_contexts(app.routes):
        for method in context.methods or ("GET",):
            yield re.sub(r"\{[^}]*\}", "x", context.path), method


def extra_router():
    router = APIRouter()

    @router.get("/added/later")
    def added():
        return {}

    return router


@pytest.mark.parametrize("open_metrics", [False, True])
def test_every_route_but_the_open_ones_answers_401_without_a_key(open_metrics):
    _, app = make_server(api_keys=KEYS, open_metrics=open_metrics, routers=[extra_router()])
    client = TestClient(app)
    found = list(routes_of(app))
    assert {"/v1/completions", "/metrics", "/openapi.json", "/added/later", "/", "/load"} <= {path for path, _ in found}
    open_paths = {"/", "/static/x", "/health", "/health/live", "/health/ready"}
    open_paths |= {"/metrics", "/openapi.json"} if open_metrics else set()
    for path, method in [
        *found,
        ("/nope", "GET"),
        ("/v1/completions", "GET"),
        ("/healthy", "GET"),
        ("/Metrics", "GET"),
    ]:
        response = client.request(method, path)
        assert (response.status_code == 401) == (path not in open_paths), (path, method, response.status_code)
        if response.status_code == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]
        assert client.request(method, path, headers=header("sk-second")).status_code != 401


@pytest.mark.parametrize(
    "value",
    ["", "sk-first", "Basic sk-first", "Bearer", "Bearer ", "Bearer sk-firs", "Bearer sk-first2", "Bearer SK-FIRST"],
)
def test_another_key_opens_nothing(value):
    client = TestClient(make_server(api_keys=KEYS)[1])
    assert client.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_without_keys_everything_is_open():
    assert TestClient(make_server()[1]).get("/v1/models").status_code == 200


def test_no_byte_of_a_body_is_read_without_a_key():
    _, app = make_server(api_keys=KEYS)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


def test_all_keys_are_compared_however_early_one_is_found(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append(a)
        return a == b

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = Keys(("a", "b", "c"))
    for key in ("a", "c", "none"):
        compared.clear()
        keys.find(f"Bearer {key}")
        assert len(compared) == 3
    assert len({len(digest) for digest in compared}) == 1


def test_tenants_share_no_cached_prefix():
    llm, app = make_server(api_keys=KEYS)
    client = TestClient(app)
    for key in KEYS:
        client.post("/v1/completions", json={"prompt": "a", "cache_salt": "s"}, headers=header(key))
        client.post("/v1/completions", json={"prompt": "a"}, headers=header(key))
    salts = [asked.cache_salt for asked in llm.asked]
    assert len(set(salts)) == 4 and not any("sk-" in salt for salt in salts)
    assert salts[0].startswith(salts[1]) and salts[0].endswith("/s")


def test_one_tenant_has_no_salt_but_its_own():
    llm, app = make_server(api_keys=KEYS[:1])
    TestClient(app).post("/v1/completions", json={"prompt": "a", "cache_salt": "s"}, headers=header(KEYS[0]))
    assert llm.asked[0].cache_salt == "s"


def test_a_file_of_keys_is_one_key_a_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nsk-a\n\n  sk-b \r\nsk-a\n")
    assert load_api_keys(path) == ("sk-a", "sk-b", "sk-a")
    assert len(Keys(load_api_keys(path)).tenants) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# none\n\n", "holds no key"),
        (b"two words\n", "spaces"),
        (b"sk-\xc3\xa9\n", "must be ASCII"),
        (b"x" * 2000, "more than 1024"),
        (b"a\x00b\n", "control"),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_api_keys(path)
    assert "\n" not in str(caught.value) and "sk-" not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        load_api_keys(tmp_path / "none")


def test_a_request_keeps_its_id_where_that_is_short_and_plain():
    client = TestClient(make_server(max_request_id_chars=16)[1])
    assert client.get("/v1/models", headers={"x-request-id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    for value in ("", "x" * 17, "a b", 'a"', "a\tb"):
        given = client.get("/v1/models", headers={"x-request-id": value}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{32}", given)


def test_other_sites_pages_may_call_where_they_are_allowed_to():
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asked = {**preflight, "access-control-request-headers": "authorization, content-type"}
    client = TestClient(make_server(api_keys=KEYS, cors_allow_origins=("https://a.example",))[1])
    response = client.options("/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    refused = client.get("/v1/models", headers={"origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
    other = client.get("/v1/models", headers={"origin": "https://b.example", **header(KEYS[0])})
    assert "access-control-allow-origin" not in other.headers
    closed = TestClient(make_server(api_keys=KEYS)[1])
    assert closed.options("/v1/completions", headers=asked).status_code == 401
