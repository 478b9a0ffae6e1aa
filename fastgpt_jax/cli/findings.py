"""What `fastgpt doctor` found, as plain data. Knows no JAX, so that a broken one can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fastgpt_jax.cli.machine import Machine
from fastgpt_jax.cli.packages import Probed


@dataclasses.dataclass(frozen=True)
class ArtifactCheck:
    """What was found.

    Attributes:
      error: Why it must not be served, in one line; None where it may.
      model: What the manifest calls the model; None where no manifest could be read, and so below.
      num_entry_points: Steps it holds.
      num_bytes: Of all its files.
      verified_s: Time that reading every byte took.
      mismatches: In what this environment differs from the one it was compiled for.
      is_fingerprint_checked: Whether it ran, and gave the numbers that it should.
    """

    path: str
    error: str | None = None
    model: str | None = None
    num_entry_points: int | None = None
    num_bytes: int | None = None
    verified_s: float | None = None
    mismatches: tuple[str, ...] = ()
    is_fingerprint_checked: bool = False


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
      packages: Distribution -> how its import went, for what the project needs.
      extras: The same for what is optional.
      devices: A probe with the devices, or why there are none.
      compiler: How importing the compiler went.
      kernels: The native CPU kernels: the instructions they use, or why there are none.
    """

    python: str
    fastgpt_jax: str
    packages: Mapping[str, Probed]
    extras: Mapping[str, Probed]
    devices: Probed
    compiler: Probed
    kernels: Probed
    machine: Machine
    artifact: ArtifactCheck | None = None

    @property
    def problems(self) -> list[str]:
        """What keeps something from working, a line each."""
        problems = [
            f"{name} is not installed; install the project again" if found.is_missing else f"{name}: {found.error}"
            for name, found in self.packages.items()
            if not found.is_usable
        ]
        problems += [f"{name}: {found.error}" for name, found in self.extras.items() if found.error is not None]
        if self.devices.error is not None:
            problems.append(f"JAX finds no devices: {self.devices.error}")
        if self.compiler.error is not None:
            problems.append(f"the compiler cannot be imported: {self.compiler.error}")
        if self.kernels.error is not None:
            problems.append(f"quantized and bfloat16 models are many times slower on CPU: {self.kernels.error}")
        if self.artifact is not None and self.artifact.error is not None:
            problems.append(f"artifact: {self.artifact.error}")
        return problems
