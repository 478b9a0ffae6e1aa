"""A script that `fastgpt doctor` runs in a process of its own: imports modules and tells how each went.

    python probe.py jax torch :devices

A line of JSON after each, on what was standard output, so that the parent knows which one took the process down.
`:devices` asks JAX for its devices, `:kernels` the native kernels for the instructions that they use. Needs nothing but
Python itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import warnings
from typing import Any

DEVICES = ":devices"
KERNELS = ":kernels"


def main(names: list[str]) -> None:
    """Probes what is named, in order."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints while it is imported is none of ours
    for name in names:
        try:
            found = PROBES[name]() if name in PROBES else import_module(name)
        except BaseException as error:  # broken native code raises whatever it likes
            found = {"error": describe(error)}
        print(json.dumps({"probe": name, **found}), file=lines, flush=True)


def import_module(name: str) -> dict[str, Any]:
    """Imports a module; says whether it is there."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return {"is_missing": True}
    with warnings.catch_warnings(action="ignore"):
        importlib.import_module(name)
    return {}


def list_devices() -> dict[str, Any]:
    """The devices that JAX would serve from."""
    import jax  # noqa: PLC0415 - the script must start where there is no JAX

    devices = [
        {"platform": device.platform, "kind": device.device_kind, "memory_bytes": _memory_bytes(device)}
        for device in jax.devices()
    ]
    return {"devices": devices}


def describe_kernels() -> dict[str, Any]:
    """The instructions that the native CPU kernels use here, or why there are none."""
    from fastgpt_jax.kernels.cpu import library  # noqa: PLC0415 - it needs JAX

    reason = library.unusable_reason()
    return {"version": library.isa()} if reason is None else {"error": reason}


PROBES = {DEVICES: list_devices, KERNELS: describe_kernels}


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())[:300]


def _memory_bytes(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:
        return None


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(sys.argv[1:])
