"""A server answers before it is ready, finishes what it began, and ends as it was told."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import threading
import time

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse, StreamingResponse

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.serving import health, lifecycle
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.errors import as_api_error
from fastgpt_jax.serving.lifecycle import Served, run_server
from fastgpt_jax.serving.logs import AccessLog, JsonFormatter, TextFormatter, configure_logging
from fastgpt_jax.serving.middleware import Surround
from fastgpt_jax.serving.settings import ServerSettings
from tests.serving.scripted_engine import ScriptedEngine


def make_served(engine, **limits):
    """An application of one route, which streams the tokens of a request that asks for `n` of them."""
    llm = AsyncLLM(engine, **{"max_queue_len": 100, "max_queued_tokens": 10_000, **limits})
    app = FastAPI()
    app.include_router(health.make_router(llm))
    app.include_router(health.make_load_router(llm))

    @app.get("/tokens/{name}/{n}")
    async def tokens(name: str, n: int):
        async def write():
            yield text(first, 0)
            num_sent = len(first.outputs[0].token_ids)
            async for output in outputs:
                yield text(output, num_sent)
                num_sent = len(output.outputs[0].token_ids)
            yield "end"

        outputs = llm.generate(name, [1, 2], SamplingParams(max_tokens=n))
        try:
            first = await anext(outputs)
        except Exception as error:
            return as_api_error(error).response()
        return StreamingResponse(write())

    return Served(llm, app)


def text(output, num_sent):
    return "".join(f"{token_id} " for token_id in output.outputs[0].token_ids[num_sent:])


def slow_engine(step_s=0.01):
    return ScriptedEngine(before_step=lambda engine: time.sleep(step_s))


async def with_server(body, load, **settings):
    """Runs `body(client)` beside a server; returns the server's exit code and what the body returned."""
    address = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(run_server(ServerSettings(port=0, **settings), load, address.set_result))
    await asyncio.wait((server, address), return_when=asyncio.FIRST_COMPLETED)
    if server.done():
        return server.result(), None
    async with httpx.AsyncClient(base_url=address.result(), timeout=30, verify=False) as client:
        result = await body(client)
    return await asyncio.wait_for(server, 20), result


async def until_ready(client):
    while (await client.get("/health/ready")).status_code != 200:
        await asyncio.sleep(0.005)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_port_answers_while_the_model_loads():
    may_load = threading.Event()

    def load():
        may_load.wait(10)
        return make_served(ScriptedEngine())

    async def body(client):
        live, ready = await client.get("/health/live"), await client.get("/health/ready")
        assert (live.status_code, ready.status_code) == (200, 503)
        assert live.json() == {"status": "live"} and ready.json()["error"]["code"] == "not_ready"
        other = await client.get("/tokens/a/2")
        assert other.status_code == 503 and other.headers["retry-after"] and other.headers["x-request-id"]
        may_load.set()
        await until_ready(client)
        assert (await client.get("/tokens/a/2")).text == "0 1 end"
        assert (await client.get("/load")).json()["server_load"] == 0
        stop()

    assert asyncio.run(with_server(body, load))[0] == 0


def test_what_cannot_be_loaded_ends_the_server_with_its_reason():
    def load():
        raise UserError("the artifact is damaged")

    async def body(client):
        await asyncio.sleep(0)

    with pytest.raises(UserError, match="damaged"):
        asyncio.run(with_server(body, load))


def test_a_signal_while_loading_ends_at_once():
    may_load = threading.Event()

    async def body(client):
        stop()
        return time.monotonic()

    code, stopped_s = asyncio.run(with_server(body, lambda: may_load.wait(10)))
    assert code == 0 and time.monotonic() - stopped_s < 2
    may_load.set()


def test_sigterm_lets_requests_finish_and_takes_no_new_ones():
    engine = slow_engine()

    async def body(client):
        await until_ready(client)
        running = [asyncio.create_task(client.get(f"/tokens/r{index}/40")) for index in range(8)]
        while engine.num_steps < 5:
            await asyncio.sleep(0.005)
        stop()
        while (await client.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.002)
        late = await client.get("/tokens/late/2")
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        assert (await client.get("/health/live")).status_code == 200
        return [answer.text.endswith("39 end") for answer in await asyncio.gather(*running)]

    code, are_whole = asyncio.run(with_server(body, lambda: make_served(engine)))
    assert code == 0 and are_whole == [True] * 8


@pytest.mark.parametrize("how", ["deadline", "second signal"])
def test_what_takes_too_long_is_aborted(how):
    engine = slow_engine(0.05)

    async def body(client):
        await until_ready(client)
        running = asyncio.create_task(client.get("/tokens/long/60"))
        while engine.num_steps < 2:
            await asyncio.sleep(0.005)
        stop()
        if how == "second signal":
            await asyncio.sleep(0.05)
            stop()
        with contextlib.suppress(httpx.HTTPError):
            return (await running).text
        return ""

    started_s = time.monotonic()
    timeout_s = 0.2 if how == "deadline" else 30.0
    code, text = asyncio.run(with_server(body, lambda: make_served(engine), shutdown_timeout_s=timeout_s))
    assert code == lifecycle.EXIT_ABORTED and "end" not in text and not engine.requests
    assert time.monotonic() - started_s < 10


def test_health_answers_within_100_ms_during_a_long_step():
    is_in_step, may_end = threading.Event(), threading.Event()

    def long_step(engine):
        is_in_step.set()
        may_end.wait(10)

    async def body(client):
        await until_ready(client)
        running = asyncio.create_task(client.get("/tokens/a/1"))
        while not is_in_step.is_set():
            await asyncio.sleep(0.005)
        worst_s = 0.0
        for path in ("/health/live", "/health/ready", "/load") * 5:
            started_s = time.monotonic()
            assert (await client.get(path)).status_code == 200
            worst_s = max(worst_s, time.monotonic() - started_s)
        may_end.set()
        await running
        stop()
        return worst_s

    engine = ScriptedEngine(before_step=long_step)
    assert asyncio.run(with_server(body, lambda: make_served(engine)))[1] < 0.1


def test_a_dead_engine_is_no_longer_live():
    def fail(engine):
        raise ValueError("device lost")

    async def body(client):
        await until_ready(client)
        answers = [await client.get(f"/tokens/r{index}/2") for index in range(4)]
        assert [answer.json()["error"]["code"] for answer in answers] == ["step_failed"] * 2 + ["engine_stopped"] * 2
        assert (await client.get("/health/live")).status_code == 503
        assert "device lost" not in "".join(answer.text for answer in answers)
        stop()

    asyncio.run(with_server(body, lambda: make_served(ScriptedEngine(before_step=fail))))


def test_large_headers_are_refused_in_our_form_and_endless_ones_cut_off():
    def load():
        served = make_served(ScriptedEngine())
        return Served(served.llm, Surround(served.app, max_header_bytes=1000, max_request_id_chars=64))

    async def body(client):
        await until_ready(client)
        answers = [await client.get("/health/live", headers={"x": "a" * nbytes}) for nbytes in (700, 1100)]
        assert [answer.status_code for answer in answers] == [200, 413]
        assert answers[1].json()["error"]["code"] == "headers_too_large"
        with contextlib.suppress(httpx.HTTPError):  # it may be cut off while it is sent
            assert (await client.get("/health/live", headers={"x": "a" * 1_000_000})).status_code in (400, 413)
        assert (await client.get("/health/live")).status_code == 200
        stop()

    assert asyncio.run(with_server(body, load, max_header_bytes=1000))[0] == 0


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(UserError, match="cannot listen on --host 127.0.0.1 --port .*: Address already in use"):
            asyncio.run(run_server(settings, lambda: make_served(ScriptedEngine())))


def test_certificates_that_are_none_are_one_line(tmp_path):
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("this is no certificate")
    with pytest.raises(UserError, match="ssl_certfile"):
        asyncio.run(run_server(ServerSettings(port=0, ssl_certfile=wrong, ssl_keyfile=wrong), lambda: None))
    with pytest.raises(UserError, match="go together"):
        ServerSettings(ssl_certfile=wrong)


def test_tls(tmp_path):
    certificate, key = make_certificate(tmp_path)

    async def body(client):
        assert client.base_url.scheme == "https"
        await until_ready(client)
        stop()

    load = lambda: make_served(ScriptedEngine())
    assert asyncio.run(with_server(body, load, ssl_certfile=certificate, ssl_keyfile=key))[0] == 0


def make_certificate(folder):
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    ssl.create_default_context().load_verify_locations(certificate)
    return certificate, key


def test_each_request_is_one_line_and_tells_no_secret():
    lines = io.StringIO()
    configure_logging("json", "info", lines)

    async def body(client):
        await until_ready(client)
        await client.get("/tokens/a/3?secret=1", headers={"authorization": "Bearer sesame"})
        stop()

    try:
        asyncio.run(with_server(body, lambda: make_served(ScriptedEngine())))
    finally:
        logging.getLogger().handlers.clear()
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    requests = [record for record in records if record["message"] == "request"]
    assert [(one["method"], one["path"], one["status"]) for one in requests] == [("GET", "/tokens/a/3", 200)]
    assert requests[0]["bytes"] == len("0 1 2 end") and requests[0]["ms"] >= requests[0]["first_byte_ms"] > 0
    assert [record["message"] for record in records if record not in requests] == ["ready", "draining", "ended"]
    assert "secret" not in lines.getvalue() and "sesame" not in lines.getvalue()


def test_both_formats_keep_a_record_on_its_line():
    record = logging.makeLogRecord({"msg": "a\nb", "levelname": "INFO", "created": 0.5, "status": 200})
    assert json.loads(JsonFormatter().format(record))["message"] == "a\nb"
    assert "\n" not in JsonFormatter().format(record)
    record.msg = "request"
    assert TextFormatter().format(record) == "1970-01-01T00:00:00.500Z info    request status=200"


def test_an_answer_that_the_application_cannot_give_is_still_logged(caplog):
    async def broken(scope, receive, send):
        await PlainTextResponse("x" * 7)(scope, receive, send)
        raise RuntimeError("late")

    async def ignore(message): ...

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "state": {"request_id": "r1"}}
    with caplog.at_level("INFO", "fastgpt_jax.serving.access"), pytest.raises(RuntimeError):
        asyncio.run(AccessLog(broken)(scope, ignore, ignore))
    assert caplog.records[0].request_id == "r1" and caplog.records[0].bytes == 7


def test_connections_send_answers_at_once():
    with lifecycle._listen("127.0.0.1", 0, "--port 0") as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
