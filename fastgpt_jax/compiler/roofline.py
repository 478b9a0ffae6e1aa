"""What bounds an operation on a machine: arithmetic or memory, by its FLOPs a byte against the machine's.

The one idea is the roofline: an operation takes at least the time of its FLOPs at peak, and at least that of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Bound = Literal["compute", "memory", "free"]


@dataclass(frozen=True)
class Machine:
    """A machine by what its maker states.

    Attributes:
      name: As people call it, with the dtype of its peak.
      flops_per_s: Dense multiply-adds count two.
      bytes_per_s: Of its main memory.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float

    @property
    def balance(self) -> float:
        """FLOPs a byte at which an operation is bound by both."""
        return self.flops_per_s / self.bytes_per_s

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time of an operation."""
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)

    def bound(self, flops: float, nbytes: float) -> Bound:
        """What an operation waits for."""
        if not flops and not nbytes:
            return "free"
        return "compute" if flops >= self.balance * nbytes else "memory"


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "cpu": Machine("an x86-64 core with AVX2, float32", 1e11, 1e10),
        "h100": Machine("NVIDIA H100 SXM, bfloat16", 989e12, 3.35e12),
        "tpu-v5e": Machine("Google TPU v5e, bfloat16", 197e12, 819e9),
    }
)
