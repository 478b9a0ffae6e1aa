"""Which packages are here and whether they can be imported, found out where a broken one does no harm.

The one idea: one child process imports them all, one after another; when it dies or hangs, the package it was at is
the broken one, and a new child goes on behind it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastgpt_jax.cli import probe

REQUIRED: Mapping[str, str] = MappingProxyType(
    {
        "numpy": "numpy",
        "ml-dtypes": "ml_dtypes",
        "jax": "jax",
        "jaxlib": "jaxlib",
        "jaxtyping": "jaxtyping",
        "safetensors": "safetensors",
        "tokenizers": "tokenizers",
        "jinja2": "jinja2",
        "flatbuffers": "flatbuffers",
        "absl-py": "absl",
        "ml-collections": "ml_collections",
        "tqdm": "tqdm",
        "flax": "flax",
        "optax": "optax",
        "orbax-checkpoint": "orbax.checkpoint",
        "huggingface_hub": "huggingface_hub",
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "pydantic": "pydantic",
        "prometheus_client": "prometheus_client",
        "llguidance": "llguidance",
        "httpx": "httpx",
        "pyyaml": "yaml",
    }
)
"""Distributions that the project needs -> the module of each."""

OPTIONAL: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "matplotlib": ("matplotlib", "draws the loss curve of a training run"),
        "torch": ("torch", "only for the scripts that make goldens"),
        "transformers": ("transformers", "only for the scripts that make goldens"),
    }
)
"""Distributions that add something -> the module of each and what it adds."""

TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Probed:
    """How an import went.

    Attributes:
      version: Of the distribution, or what the native kernels use; None where none is installed.
      error: Why it cannot be used, in one line; None where it can.
      is_missing: Whether it is not here at all.
      devices: What JAX found, for the probe of devices.
    """

    version: str | None = None
    error: str | None = None
    is_missing: bool = False
    devices: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether it is here and can be imported."""
        return self.error is None and not self.is_missing


def version_of(distribution: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # metadata that cannot be read is none
        return None


def probe_all(names: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> dict[str, Probed]:
    """Probes modules, and `probe.DEVICES`, in child processes; never raises.

    Args:
      timeout_s: Longest that a child may run.
    """
    found: dict[str, Probed] = {}
    while len(found) < len(names):
        rest = [name for name in names if name not in found]
        lines, ending = _run_child(rest, timeout_s)
        found |= {line["probe"]: _read_line(line) for line in lines}
        unfinished = next((name for name in rest if name not in found), None)
        if unfinished is not None:
            found[unfinished] = Probed(error=ending)
    return found


def _run_child(names: Sequence[str], timeout_s: float) -> tuple[list[Any], str]:
    """Runs the probes; returns the lines that came, and how the process ended."""
    command = [sys.executable, str(Path(probe.__file__)), *names]
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, timeout=timeout_s)
        output, ending = done.stdout, f"the process that imported it ended with {_describe_code(done.returncode)}"
    except subprocess.TimeoutExpired as error:
        output, ending = error.stdout or b"", f"it did not finish importing in {timeout_s:.0f} s"
    except OSError as error:
        output, ending = b"", f"no process could be started to import it: {error.strerror}"
    return [json.loads(line) for line in output.splitlines() if line.endswith(b"}")], ending


def _read_line(line: Mapping[str, Any]) -> Probed:
    return Probed(line.get("version"), line.get("error"), line.get("is_missing", False), tuple(line.get("devices", ())))


def _describe_code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
