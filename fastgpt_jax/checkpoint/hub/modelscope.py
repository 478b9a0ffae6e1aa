"""Models of ModelScope, by its HTTP API.

Knows two requests: the list of a repository's files, and one file of it. The one idea: files are fetched into a folder
beside their place, each under the name `.incomplete` until it is whole and its digest right, and the folder is moved to
its place at the end; so what is in its place is whole, and what was interrupted goes on where it stopped.

Source: the API that the `modelscope` package uses, `/api/v1/models/ID/repo/files` and `/api/v1/models/ID/repo`.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgpt_jax.checkpoint.hub.files import check_sha256, choose_files, is_complete
from fastgpt_jax.checkpoint.hub.model_id import HubSettings, ModelId
from fastgpt_jax.errors import UserError

_DEFAULT_REVISION = "master"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub lists it; `sha256` is None where it says none."""

    name: str
    num_bytes: int
    sha256: str | None


def find_on_modelscope(model: ModelId, settings: HubSettings) -> Path:
    """The model's folder in the cache, downloaded first where it is not there or not whole.

    Raises:
      UserError: It is not in the cache and cannot be fetched; the message says why, and what to do.
    """
    root = settings.modelscope_cache or Path.home() / ".cache" / "modelscope" / "hub"
    for folder in _folders(root, model):
        if folder.is_dir() and is_complete(folder):
            return folder
    if settings.is_offline:
        raise _unreachable(model, root, "working offline was asked for")
    place = _folders(root, model)[0]
    try:
        return _download(model, place, settings)
    except urllib.error.HTTPError as error:
        raise _refused(model, settings.modelscope_endpoint, error.code) from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise _unreachable(model, root, f"{settings.modelscope_endpoint} cannot be reached: {reason}") from error
    except OSError as error:
        raise UserError(f"cannot write {error.filename or place}: {error.strerror}") from error


def _folders(root: Path, model: ModelId) -> list[Path]:
    """Where the model may lie, the place for a new one first; the hub's own tools write `___` for a dot.

    Their cache holds one revision of a model; one that was asked for by name has a folder of its own here.
    """
    revision = f"@{model.revision.replace('/', '--')}" if model.revision else ""
    names = dict.fromkeys([model.name.replace(".", "___") + revision, model.name + revision])
    return [base / model.owner / name for base in (root / "models", root) for name in names]


def _download(model: ModelId, place: Path, settings: HubSettings) -> Path:
    revision = model.revision or _DEFAULT_REVISION
    address = f"{settings.modelscope_endpoint.rstrip('/')}/api/v1/models/{model.repository}/repo"
    listed = _list_files(f"{address}/files?{_query(Revision=revision, Recursive='true')}", model, settings)
    files = [listed[name] for name in choose_files(listed, model)]
    staging = place.parent / f".{place.name}.incomplete"
    staging.mkdir(parents=True, exist_ok=True)
    total = sum(file.num_bytes for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(model), disable=None) as progress:
        for file in files:
            url = f"{address}?{_query(Revision=revision, FilePath=file.name)}"
            _fetch(url, file, staging, model, settings, progress)
    if place.exists():  # what lay there was not whole
        shutil.rmtree(place)
    os.replace(staging, place)
    return place


def _list_files(url: str, model: ModelId, settings: HubSettings) -> dict[str, RemoteFile]:
    with urllib.request.urlopen(url, timeout=settings.timeout_s) as response:
        body = response.read()
    try:
        entries = json.loads(body)["Data"]["Files"]
        files = [
            RemoteFile(str(entry["Path"]), int(entry["Size"]), entry.get("Sha256") or None)
            for entry in entries
            if entry["Type"] != "tree"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{settings.modelscope_endpoint} answered something other than the files of {model}; try again later"
        ) from error
    return {file.name: file for file in files}


def _fetch(url: str, file: RemoteFile, folder: Path, model: ModelId, settings: HubSettings, progress: Any) -> None:
    """Downloads one file, from where an earlier attempt stopped."""
    done, partial = folder / file.name, folder / f"{file.name}.incomplete"
    if done.exists():
        progress.update(file.num_bytes)
        return
    start = partial.stat().st_size if partial.exists() else 0
    if start > file.num_bytes:
        start = 0
    if start < file.num_bytes or not partial.exists():
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
            start = start if response.status == 206 else 0  # 200: the server sends all of it
            progress.update(start)
            with partial.open("ab" if start else "wb") as output:
                while chunk := response.read(_CHUNK_BYTES):
                    output.write(chunk)
                    progress.update(len(chunk))
    found = partial.stat().st_size
    if found < file.num_bytes:
        raise UserError(
            f"{file.name} of {model} broke off after {found:,} of {file.num_bytes:,} bytes; run again to go on"
        )
    if found > file.num_bytes:
        partial.unlink()
        raise UserError(
            f"{file.name} of {model} arrived damaged: it has {found:,} bytes, the hub says {file.num_bytes:,}; it was "
            "removed, run again to fetch it again"
        )
    check_sha256(partial, file.sha256, model)
    os.replace(partial, done)


def _query(**fields: str) -> str:
    return urllib.parse.urlencode(fields)


def _refused(model: ModelId, endpoint: str, status: int) -> UserError:
    if status in (401, 403):
        return UserError(
            f"{model} is private or gated (status {status}); fetch it with ModelScope's own tools, logged in, and give "
            "the path of its folder"
        )
    if status == 404:
        revision = f" with a revision {model.revision!r}" if model.revision else ""
        return UserError(f"there is no model {model.repository}{revision} at {endpoint}; check the name")
    return UserError(f"{endpoint} refused {model} with status {status}; try again later")


def _unreachable(model: ModelId, root: Path, reason: str) -> UserError:
    return UserError(
        f"there is no whole {model} in {root}, and {reason}; fetch it where there is a network, or give the path of a "
        "model folder"
    )
