"""Whether an artifact is whole, fits this environment, and computes here what it did when it was compiled.

The one idea: the three are told apart, since only the first and the last forbid serving: another environment costs a
compilation at start.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from fastgpt_jax.artifact.environment import current_environment
from fastgpt_jax.artifact.loading import load_artifact
from fastgpt_jax.artifact.manifest import Manifest
from fastgpt_jax.artifact.verify import verify_artifact
from fastgpt_jax.cli.devices import count_mesh_devices, make_virtual_devices
from fastgpt_jax.cli.findings import ArtifactCheck
from fastgpt_jax.errors import UserError


def check_artifact(path: str) -> ArtifactCheck:
    """Verifies every byte, compares environments, and runs the fingerprint where the code may run here."""
    folder, started = Path(path), time.monotonic()
    if not folder.is_dir():
        return ArtifactCheck(path, f"no such artifact folder: {path}")
    try:
        manifest, _ = verify_artifact(folder, "full")
    except (UserError, OSError) as error:
        return ArtifactCheck(path, " ".join(str(error).split()))
    check = _describe(path, manifest, time.monotonic() - started)
    make_virtual_devices(count_mesh_devices(path))
    mismatches = tuple(manifest.environment.mismatches(current_environment()))
    if mismatches:
        return dataclasses.replace(check, mismatches=mismatches)
    try:
        load_artifact(folder, verify="fast", on_mismatch="refuse", check_fingerprint=True)
    except (UserError, OSError) as error:
        return dataclasses.replace(check, error=" ".join(str(error).split()))
    return dataclasses.replace(check, is_fingerprint_checked=True)


def _describe(path: str, manifest: Manifest, seconds: float) -> ArtifactCheck:
    num_bytes = sum(record.nbytes for record in manifest.files)
    return ArtifactCheck(path, None, manifest.model.name, len(manifest.entry_points), num_bytes, seconds)
