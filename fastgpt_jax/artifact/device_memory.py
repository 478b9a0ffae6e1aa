"""How much memory a device has: what its allocator says, or for processors what the machine and its container allow.

Knows nothing of models. The one idea: devices that one machine plays share its memory evenly.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax


def device_memory_bytes(num_devices: int = 1) -> int:
    """Bytes that each device may hold.

    Args:
      num_devices: Devices in use; processors share what the machine has.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or machine_memory_bytes() // num_devices)


def machine_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may use: those of the machine, or fewer where a control group allows fewer.

    Args:
      root: The folder that holds `proc` and `sys`.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not controllers:  # the one hierarchy of version 2
            limits += _limits(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return min(limits)


def _limits(base: Path, path: str, name: str) -> list[int]:
    """What the group and every one above it allow; `max` is no limit."""
    group, found = base / path.strip("/"), []
    while group == base or base in group.parents:
        found += [int(text) for text in _lines(group / name)[:1] if text.isdecimal()]
        group = group.parent
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
