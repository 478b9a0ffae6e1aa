"""What machine code was made for, and in what this process differs from that.

Knows no artifact. The one idea: a difference is named, field by field, in words a user can act on.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax

from fastgpt_jax.artifact.executable import compiler_versions
from fastgpt_jax.kernels.cpu.library import interface

_CPU_FEATURES = re.compile(
    r"sse.*|ssse3|avx.*|amx.*|fma|fma4|f16c|bmi[12]|abm|adx|aes|sha_ni|gfni|vaes|vpclmulqdq|pclmulqdq|popcnt|movbe|xop"
    r"|asimd.*|sve.*|i8mm|bf16|fphp|sm[34]|sha[1235].*"
)
"""Instruction sets that compilers ask for, in the kernel's spelling; the rest of its list says nothing about code."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where machine code may run.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`, as JAX says it.
      platform_version: Of the backend and its compiler, as it says it; accelerators have their own beside jaxlib's.
      device_kind: The device's own name.
      device_count: Devices the program runs on, or devices there are.
      cpu_features: Instruction sets, for programs of the CPU; empty for others.
      cpu_kernels: Interface of the native CPU kernels that programs call, or can call here; empty for none.
    """

    jax: str
    jaxlib: str
    platform: str
    platform_version: str
    device_kind: str
    device_count: int
    cpu_features: tuple[str, ...]
    cpu_kernels: str = ""

    def mismatches(self, here: Environment) -> tuple[str, ...]:
        """What keeps code made for this environment from running `here`, a clause a field."""
        found = []
        for name in ("jax", "jaxlib", "platform", "platform_version", "device_kind"):
            made, is_now = getattr(self, name), getattr(here, name)
            if made != is_now:
                found.append(f"{name} is {is_now}, the artifact was made with {made}")
        if here.device_count < self.device_count:
            found.append(f"device_count is {here.device_count}, the artifact was made for {self.device_count}")
        missing = [name for name in self.cpu_features if name not in here.cpu_features]
        if missing and here.platform == self.platform:
            found.append(f"cpu_features lack {', '.join(missing)}, which the artifact was made with")
        if self.cpu_kernels and self.cpu_kernels != here.cpu_kernels:
            is_now = f"are version {here.cpu_kernels}" if here.cpu_kernels else "cannot be used"
            found.append(f"cpu_kernels {is_now} here, the artifact was made with version {self.cpu_kernels}")
        return tuple(found)


def current_environment(device_count: int | None = None) -> Environment:
    """This process's environment; starts JAX's backend, and on CPU makes the native kernels known to it.

    Args:
      device_count: Devices that are to be used; None counts those there are.
    """
    device = jax.devices()[0]
    return Environment(
        **compiler_versions(),
        platform=device.platform,
        device_kind=device.device_kind,
        device_count=len(jax.devices()) if device_count is None else device_count,
        cpu_features=read_cpu_features() if device.platform == "cpu" else (),
        cpu_kernels=interface() if device.platform == "cpu" else "",
    )


def read_cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets of this machine's CPU, sorted; empty where the kernel does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return ()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return tuple(sorted(filter(_CPU_FEATURES.fullmatch, line[1].split()))) if line else ()
