"""The machine as Linux tells it: processor and its features, cores and memory, and what a container allows of them.

Knows no JAX. The one idea: a file that is absent or reads otherwise than expected is a fact that is not known, never a
failure.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

SHOWN_FEATURES = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
"""Features, as Linux spells them, that decide how fast matrix products are."""

NO_LIMIT = 2**60
"""What a control group says in place of a limit is at least this many bytes."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Facts of this machine; None is not known.

    Attributes:
      num_cores: Cores there are.
      usable_cores: Cores that this process may keep busy, by its affinity and its container's quota.
      memory_limit_bytes: What the container allows; None where it sets no limit.
    """

    architecture: str
    cpu_model: str | None
    cpu_features: tuple[str, ...]
    num_cores: int | None
    usable_cores: float | None
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit_bytes: int | None


def read_machine(root: Path = Path("/")) -> Machine:
    """Reads what there is.

    Args:
      root: The folder that holds `proc` and `sys`.
    """
    cpu = _fields(root / "proc/cpuinfo")
    memory = _fields(root / "proc/meminfo")
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    limits = [_number(text) for text in _cgroup_files(root, "memory", "memory.max", "memory.limit_in_bytes")]
    limits = [limit for limit in limits if limit is not None and limit < NO_LIMIT]
    return Machine(
        platform.machine(),
        cpu.get("model name") or cpu.get("CPU part"),
        tuple(name for name in SHOWN_FEATURES if name in flags),
        os.cpu_count(),
        _usable_cores(root),
        _kibibytes(memory.get("MemTotal")),
        _kibibytes(memory.get("MemAvailable")),
        min(limits, default=None),
    )


def _usable_cores(root: Path) -> float | None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [text.split() for text in _cgroup_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us")]
    periods = [[text] for text in _cgroup_files(root, "cpu", "cpu.max", "cpu.cfs_period_us")]
    allowed: list[float] = [] if count is None else [float(count)]
    for quota, period in zip(quotas, periods, strict=False):
        pair = quota if len(quota) == 2 else [*quota, *period]
        numbers = [_number(text) for text in pair]
        if len(numbers) == 2 and numbers[0] and numbers[1] and min(numbers[0], numbers[1]) > 0:
            allowed.append(numbers[0] / numbers[1])
    return min(allowed, default=None)


def _cgroup_files(root: Path, controller: str, name: str, name_v1: str) -> list[str]:
    """What a controller's file says in this process's control group and in every one above it."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        base, file = root / "sys/fs/cgroup", name
        if controllers:
            if controller not in controllers.split(","):
                continue
            base, file = base / controllers, name_v1
            base = base if base.is_dir() else root / "sys/fs/cgroup" / controller
        group = base / path.strip("/")
        while group != base.parent and group.is_relative_to(base):
            found.append(_read(group / file).strip())
            group = group.parent
    return [text for text in found if text]


def _fields(path: Path) -> dict[str, str]:
    """The first value of each `name : value` line."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _kibibytes(text: str | None) -> int | None:
    number = _number((text or "").removesuffix(" kB"))
    return None if number is None else number * 1024


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
