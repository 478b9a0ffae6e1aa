"""A server from its first breath to its last: it listens, loads, serves, drains and ends.

Knows no route but those of health. The one idea: the port is there before the model is, and until the model has gone;
what changes in between is the application behind it, and `/health/ready` says which it is.

    listen -> load -> serve -> SIGTERM: take nothing new, finish what runs -> end
                                second SIGTERM, or shutdown_timeout_s: abort the rest -> end
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving import control, health
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.logs import AccessLog
from fastgpt_jax.serving.middleware import Surround
from fastgpt_jax.serving.settings import ServerSettings

EXIT_ABORTED = 1
"""Requests had to be ended before they were done."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
FLUSH_S = 1.0
"""What connections get at least to send the end of their answers."""
STEP_S = 10.0
"""What the last step gets to end before the process does."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Served:
    """A loaded model and the application that serves it."""

    llm: AsyncLLM
    app: ASGIApp


async def run_server(
    settings: ServerSettings, load: Callable[[], Served], announce: Callable[[str], None] = lambda url: None
) -> int:
    """Serves until a signal ends it; returns the exit code: 0, or 1 where requests had to be aborted.

    Args:
      load: Makes what is served, on a thread of its own while the port answers already.
      announce: Is told the address once the port answers.

    Raises:
      UserError: The port, a certificate or the model is not what it should be.
    """
    front = _Front(settings)
    server = _Uvicorn(_config(settings, front))
    listener = _listen(settings.host, settings.port, f"--host {settings.host} --port {settings.port}")
    with _signals() as signals:
        async with _control(settings, lambda: signals.put_nowait(signal.SIGTERM)):
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                while not server.started and not serving.done():
                    await asyncio.sleep(0.005)
                announce(_url(settings, listener))
                return await _life(settings, front, load, signals, server)
            finally:
                server.should_exit = True
                await serving


@contextlib.asynccontextmanager
async def _control(settings: ServerSettings, end: Callable[[], None]) -> AsyncIterator[None]:
    """Listens for who runs the server, if that is wanted."""
    if settings.control_port is None:
        yield
        return
    listener = _listen(control.HOST, settings.control_port, f"--control_port {settings.control_port}")
    server = _Uvicorn(_config(settings, AccessLog(control.make_control_app(settings, end))))
    _log.info("control", extra={"control_port": listener.getsockname()[1]})
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _life(
    settings: ServerSettings,
    front: _Front,
    load: Callable[[], Served],
    signals: asyncio.Queue[signal.Signals],
    server: _Uvicorn,
) -> int:
    """Loads, serves, drains."""
    started_s = time.monotonic()
    stopped = asyncio.create_task(signals.get())
    loading = _on_a_thread(load)
    await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        _log.info("ended while the model was loaded")
        return 0
    served = loading.result()
    front.serve(served)
    _log.info("ready", extra={"load_s": round(time.monotonic() - started_s, 3), "model": settings.model_name})
    await stopped
    _log.info("draining", extra={"num_unfinished": served.llm.num_unfinished})
    deadline_s = time.monotonic() + settings.shutdown_timeout_s
    is_drained = await _drain(served.llm, settings.shutdown_timeout_s, signals)
    if not is_drained:
        _log.warning("aborting", extra={"num_unfinished": served.llm.num_unfinished})
    server.config.timeout_graceful_shutdown = max(deadline_s - time.monotonic(), FLUSH_S)  # pyright: ignore
    await _close(served.llm)
    _log.info("ended", extra={"aborted": not is_drained})
    return 0 if is_drained else EXIT_ABORTED


async def _drain(llm: AsyncLLM, timeout_s: float, signals: asyncio.Queue[signal.Signals]) -> bool:
    """Lets requests finish, until the time is up or another signal comes; returns whether all did."""
    again = asyncio.create_task(signals.get())
    draining = asyncio.create_task(llm.drain(timeout_s))
    await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    draining.cancel()
    return draining.done() and not draining.cancelled() and draining.result()


async def _close(llm: AsyncLLM) -> None:
    """Ends the engine; a step that does not end is left to the end of the process."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(llm.close(), STEP_S)


class _Front:
    """The application behind the port: a waiting room first, then the one that serves."""

    is_alive, is_ready, is_draining = True, False, False

    def __init__(self, settings: ServerSettings):
        waiting_room = FastAPI(openapi_url=None)
        waiting_room.include_router(health.make_router(self))
        self._health = waiting_room
        room = Surround(
            self._wait, max_header_bytes=settings.max_header_bytes, max_request_id_chars=settings.max_request_id_chars
        )
        self._app = AccessLog(room)

    def serve(self, served: Served) -> None:
        """Lets requests in."""
        self._app = AccessLog(served.app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/health"):
            await self._health(scope, receive, send)
            return
        raise ApiError("not_ready", "the model is being loaded; ask /health/ready when it is there", headers=_RETRY)


_RETRY = {**health.RETRY_AFTER, "Connection": "close"}


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to `run_server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(settings: ServerSettings, app: Any) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,  # pyright: ignore[reportArgumentType]
        # Headers a little too large are refused in OpenAI's form; what goes on and on is cut off below it.
        h11_max_incomplete_event_size=2 * settings.max_header_bytes + 2**16,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"cannot use --ssl_certfile {settings.ssl_certfile} with --ssl_keyfile {settings.ssl_keyfile}: "
            f"{error.strerror or error}; both must be PEM files and belong together"
        ) from error
    return config


def _listen(host: str, port: int, flags: str) -> socket.socket:
    """Takes the port; a UserError that names the flags where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # Inherited by every connection: an answer in two writes would else wait 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UserError(
            f"cannot listen on {flags}: {error.strerror or error}; choose another port, or 0 for a free one"
        ) from error


def _url(settings: ServerSettings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """Collects the signals that ask the process to end."""
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _on_a_thread(load: Callable[[], Served]) -> asyncio.Future[Served]:
    """Runs `load` on a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Served] = loop.create_future()

    def tell(method: Callable[[Any], None], value: Any) -> None:
        if not future.cancelled():
            method(value)

    def run() -> None:
        try:
            method, value = future.set_result, load()
        except BaseException as error:  # whoever awaits the model is told
            method, value = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, method, value)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future
