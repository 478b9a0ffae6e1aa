"""The port of who runs the server: closed unless asked for, with keys as everywhere, and what its routes do."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import httpx
import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.control import make_control_app
from fastgpt_jax.serving.settings import ServerSettings
from tests.serving.test_lifecycle import make_served, slow_engine, stop, until_ready, with_server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ask(body, **settings):
    """What `body(client)` returns beside the routes alone, and how often they ended the server."""
    ended = []

    async def run():
        app = make_control_app(ServerSettings(**settings), lambda: ended.append(time.monotonic()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control") as client:
            return await body(client)

    return asyncio.run(run()), len(ended)


def test_a_drain_finishes_what_runs_and_ends_the_process_well():
    port = free_port()

    async def body(client):
        await until_ready(client)
        running = asyncio.create_task(client.get("/tokens/a/40"))
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as control:
            answers = [await control.post("/drain"), await control.post("/drain")]
        assert [(answer.status_code, answer.json()) for answer in answers] == [(202, {"status": "draining"})] * 2
        await asyncio.sleep(0.02)
        refused = await client.get("/tokens/b/1")
        return (await running).text, refused.status_code

    code, (text, status) = asyncio.run(with_server(body, lambda: make_served(slow_engine()), control_port=port))
    assert code == 0 and text.endswith("39 end") and status == 503


def test_no_such_routes_are_where_clients_ask_and_no_port_is_open_unasked():
    async def body(client):
        await until_ready(client)
        statuses = [(await client.post(path)).status_code for path in ("/drain", "/profile/start", "/profile/stop")]
        stop()
        return statuses

    assert asyncio.run(with_server(body, lambda: make_served(slow_engine())))[1] == [404] * 3
    assert ServerSettings().control_port is None


def test_a_key_is_asked_for_where_there_are_keys():
    async def body(client):
        paths = ("/drain", "/profile/start", "/profile/stop", "/nowhere")
        without = [(await client.post(path)).status_code for path in paths]
        return without, (await client.post("/drain", headers={"Authorization": "Bearer good"})).status_code

    assert ask(body, api_keys=("good",)) == (([401] * 4, 202), 1)


def test_profiles_are_written_where_there_is_a_folder_for_them(tmp_path):
    async def body(client):
        return [await client.post(f"/profile/{name}") for name in ("stop", "start", "start", "stop", "stop")]

    answers, _ = ask(body, control_port=0, profile_folder=tmp_path)
    assert [answer.status_code for answer in answers] == [409, 200, 409, 200, 409]
    assert set(answers[0].json()["error"]) == {"message", "type", "param", "code"}
    assert answers[3].json() == {"status": "written", "folder": str(tmp_path)}
    assert list(tmp_path.rglob("*.xplane.pb"))
    (answer, *_), _ = ask(body, control_port=0)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "route_not_found"


def test_what_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="profile_folder needs control_port"):
        ServerSettings(profile_folder=Path("x"))
    with pytest.raises(UserError, match="control_port must be between 0 and 65535"):
        ServerSettings(control_port=70000)
