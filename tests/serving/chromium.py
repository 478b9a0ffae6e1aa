"""A headless Chromium, driven through its DevTools protocol: a WebSocket and JSON, by Python's own library alone.

Skips where there is no Chromium.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-component-update", "--mute-audio"),
    *("--remote-debugging-port=0", "--window-size=1200,800", "--lang=en"),
)


@contextlib.contextmanager
def open_page(folder, *, width=1200, height=800):
    """A page of a browser of its own, which ends with the block."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium here")
    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        page = Page(_page_address(process))
        page.command("Page.enable")
        page.command("Runtime.enable")
        page.command("Log.enable")
        page.resize(width, height)
        yield page
        page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _page_address(process):
    for line in process.stderr:
        if match := re.search(r"DevTools listening on ws://(\S+?)/", line):
            with urllib.request.urlopen(f"http://{match[1]}/json") as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            return pages[0]["webSocketDebuggerUrl"]
    pytest.skip(f"Chromium does not start here (exit {process.wait()})")


class Page:
    """One tab. `problems` are errors of its console, violations of its content policy included."""

    def __init__(self, address):
        match = re.fullmatch(r"ws://([^:/]+):(\d+)(/.*)", address)
        self._socket = socket.create_connection((match[1], int(match[2])), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        hello = (
            f"GET {match[3]} HTTP/1.1\r\nHost: {match[1]}:{match[2]}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        )
        self._socket.sendall(f"{hello}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self._file = self._socket.makefile("rb")
        while self._file.readline() not in (b"\r\n", b""):
            pass
        self._ids = itertools.count(1)
        self.problems = []

    def close(self):
        self._socket.close()

    def command(self, method, **params):
        """Sends a command and returns its result."""
        number = next(self._ids)
        self._send(json.dumps({"id": number, "method": method, "params": params}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def resize(self, width, height):
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def goto(self, url):
        self.command("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        """Evaluates an expression, which may be a promise; returns its value."""
        result = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", script))
        return result["result"].get("value")

    def until(self, script, timeout_s=30.0):
        """Waits until an expression is true; returns its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} did not come true; the console says {self.problems}"
            time.sleep(0.03)
        return value

    def type(self, text):
        self.command("Input.insertText", text=text)

    def press(self, key, *, code=None, modifiers=0):
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}
        event = {"key": key, "code": code or key, "windowsVirtualKeyCode": codes.get(key, 0), "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **event)

    def prefer(self, scheme):
        """Has the system ask for a light or a dark page."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def _note(self, message):
        params = message.get("params", {})
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["exception"].get("description"))

    def _send(self, payload):
        mask, size = os.urandom(4), len(payload)
        length = bytes([128 | size]) if size < 126 else bytes([254]) + struct.pack(">H", size)
        if size > 65535:
            length = bytes([255]) + struct.pack(">Q", size)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._socket.sendall(b"\x81" + length + mask + masked)

    def _receive(self):
        payload = b""
        while True:
            first, second = self._file.read(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            payload += self._file.read(size)
            if first & 128:
                return payload
