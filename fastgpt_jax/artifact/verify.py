"""Whether an artifact's files are what was written: all of them, and no others.

The one idea: a digest that does not hold is corruption and is refused whatever else is asked for; it is no matter of
versions or machines, which `environment.py` tells apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastgpt_jax.artifact.digests import digest_files
from fastgpt_jax.artifact.executable import ArrayType
from fastgpt_jax.artifact.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    CorruptArtifact,
    FileRecord,
    Manifest,
    read_manifest,
)

Level = Literal["auto", "full", "fast"]
LEVELS: tuple[Level, ...] = ("auto", "full", "fast")
MAX_AUTO_BYTES = 8 * 10**9
"""Weights up to which `auto` means `full`."""


def verify_artifact(folder: Path, level: Level = "auto") -> tuple[Manifest, Literal["full", "fast"]]:
    """Checks an artifact; returns its manifest and what was done.

    Args:
      level: `full` reads every byte; `fast` every byte but those of the weights, whose sizes alone are checked; `auto`
        is `full` up to 8 GB of weights.

    Raises:
      CorruptArtifact: A file is missing, changed, or not the artifact's; the message names it.
      UserError: This is no artifact, or one of another format.
    """
    manifest = read_manifest(folder)
    weight_files = {record.file for record in manifest.weights}
    weight_bytes = sum(record.nbytes for record in manifest.files if record.path in weight_files)
    if level == "auto":
        level = "full" if weight_bytes <= MAX_AUTO_BYTES else "fast"
    _check_listing(folder, manifest.files)
    _check_uses(folder, manifest)
    checked = [record for record in manifest.files if level == "full" or record.path not in weight_files]
    for record, digests in zip(checked, digest_files([folder / r.path for r in checked]), strict=True):
        if digests != record.sha256:
            raise CorruptArtifact(f"{folder / record.path} is corrupt: its SHA-256 is not the manifest's; {_WAY_OUT}")
    return manifest, level


def _check_uses(folder: Path, manifest: Manifest) -> None:
    """Whatever the manifest reads must be a file it lists, and weights no other file's."""
    sizes = {record.path: record.nbytes for record in manifest.files}
    programs = [program.code for program in manifest.programs]
    programs += [entry.portable for entry in manifest.entry_points]
    programs += ["tokenizer/tokenizer.json"] if manifest.model.tokenizer is not None else []
    weights = {record.file for record in manifest.weights}
    for name in (*programs, *weights):
        if name not in sizes or name in weights and name in programs:
            raise CorruptArtifact(f"{folder / MANIFEST} uses {name}, which is none of its files; {_WAY_OUT}")
    for record in manifest.weights:
        end = record.begin + ArrayType(record.shape, record.dtype).nbytes
        if record.begin < 0 or end > sizes[record.file]:
            raise CorruptArtifact(f"{folder / MANIFEST} puts {record.name} outside of {record.file}; {_WAY_OUT}")


def _check_listing(folder: Path, files: Sequence[FileRecord]) -> None:
    expected = {record.path: record.nbytes for record in files}
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    for name in sorted(found.keys() - expected.keys() - {MANIFEST, MANIFEST_DIGEST}):
        raise CorruptArtifact(f"{folder / name} is not in the manifest; remove it, or {_WAY_OUT}")
    for name, nbytes in expected.items():
        if name not in found or not found[name].exists():
            raise CorruptArtifact(f"{folder / name} is missing; {_WAY_OUT}")
        size = found[name].stat().st_size
        if size != nbytes:
            raise CorruptArtifact(
                f"{folder / name} is corrupt: it has {size:,} bytes, the manifest says {nbytes:,}; {_WAY_OUT}"
            )


_WAY_OUT = "copy the artifact again, or compile the model again"
