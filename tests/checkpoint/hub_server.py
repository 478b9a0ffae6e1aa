"""A server on this machine that plays the two hubs: the requests that a download needs, and the ways they can fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`org/model` with these files, and what is to go wrong.

    `break_after` bytes of a file's answer the connection is cut, once per entry; `wrong_sha256` lists what the files do
    not have, `added_bytes` are listed beyond what they have; `status` answers everything, or all files alone.
    """

    files: dict[str, bytes]
    break_after: dict[str, int] = field(default_factory=dict)
    wrong_sha256: bool = False
    added_bytes: int = 0
    refuses_files_alone: bool = False
    status: int | None = None
    error_code: str | None = None
    ignores_ranges: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def sha256(self, name: str) -> str:
        return "f" * 64 if self.wrong_sha256 else hashlib.sha256(self.files[name]).hexdigest()

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".gguf", ".bin"))

    def fetched(self) -> list[tuple[str, str | None]]:
        """The files that were sent, with the range asked for."""
        return [(name, asked) for method, name, asked in self.requests if method == "GET" and name in self.files]


def serve(hub: Hub):
    """Starts the server; returns it, to be shut down."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            name = self.file_name(url.path, query)
            hub.requests.append((self.command, name or url.path, self.headers.get("Range")))
            if hub.status is not None and (name is not None or not hub.refuses_files_alone):
                return self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {})
            if name is not None:
                return self.send_file(name, with_body) if name in hub.files else self.send(404, b"{}")
            body = self.listing(url.path)
            if body is None:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            self.send(200, json.dumps(body).encode())

        def file_name(self, path, query):
            found = re.fullmatch(rf"/org/model/resolve/{COMMIT}/(.+)", path)
            if found:
                return urllib.parse.unquote(found[1])
            return query.get("FilePath") if path == "/api/v1/models/org/model/repo" else None

        def listing(self, path):
            if path == "/api/v1/models/org/model/repo/files":
                files = [
                    {"Path": name, "Size": len(data) + hub.added_bytes, "Type": "blob", "Sha256": hub.sha256(name)}
                    for name, data in hub.files.items()
                ]
                return {"Code": 200, "Data": {"Files": [*files, {"Path": "d", "Size": 0, "Type": "tree"}]}}
            if re.fullmatch(r"/api/models/org/model(/revision/main)?", path):
                return {"id": "org/model", "sha": COMMIT, "siblings": [self.sibling(name) for name in hub.files]}
            if path == f"/api/models/org/model/tree/{COMMIT}":
                return [self.tree_entry(name) for name in hub.files]
            return None

        def large(self, name):
            return {"sha256": hub.sha256(name), "size": len(hub.files[name]), "pointerSize": 134}

        def sibling(self, name):
            entry = {"rfilename": name, "size": len(hub.files[name]), "blobId": "b" * 40}
            return entry | ({"lfs": self.large(name)} if hub.is_large(name) else {})

        def tree_entry(self, name):
            entry = {"type": "file", "path": name, "size": len(hub.files[name]), "oid": "b" * 40}
            return entry | ({"lfs": self.large(name) | {"oid": hub.sha256(name)}} if hub.is_large(name) else {})

        def send_file(self, name, with_body):
            data, asked = hub.files[name], self.headers.get("Range")
            start = 0
            if asked and not hub.ignores_ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-\d*", asked)[1])
            tag = hub.sha256(name) if hub.is_large(name) else hashlib.sha1(data).hexdigest()
            self.send_response(206 if start else 200)
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data) - start)}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if not with_body:
                return
            cut = hub.break_after.pop(name, None)
            self.wfile.write(data[start:] if cut is None else data[start : start + cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

        def send(self, status, body, headers=()):
            self.send_response(status)
            for header, value in dict(headers).items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
