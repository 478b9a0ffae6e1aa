"""Virtual devices for programs that are divided over several: one processor plays them all."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import jax

from fastgpt_jax.artifact.manifest import MANIFEST

MAX_VIRTUAL_DEVICES = 256
"""More than anybody plays with; a damaged manifest may ask for any number."""


def make_virtual_devices(count: int) -> None:
    """Lets the CPU count as so many devices, unless JAX has started; accelerators are as they are."""
    if count > max(1, jax.config.jax_num_cpu_devices):  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)


def count_mesh_devices(artifact: str) -> int:
    """The devices an artifact is divided over, by a glance at its manifest; 1 where that cannot be read.

    Devices must be there before JAX starts, and reading a manifest in earnest, which tells what is wrong with it, is
    the loader's work.
    """
    try:
        axes = json.loads((Path(artifact) / MANIFEST).read_bytes())["mesh_axes"]
        return min(math.prod(int(size) for _, size in axes), MAX_VIRTUAL_DEVICES)
    except (OSError, ValueError, KeyError, TypeError):
        return 1
