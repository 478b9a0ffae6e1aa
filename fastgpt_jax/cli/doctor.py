"""`fastgpt doctor`: what this machine and this installation can do, and whether an artifact fits them.

    fastgpt doctor
    fastgpt doctor ARTIFACT --json

Exit code 2 says that the artifact is corrupt or cannot be read; what else is wrong is listed as a problem.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from typing import Any

from absl import flags

from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.exit_codes import EXIT_USER_ERROR
from fastgpt_jax.cli.findings import ArtifactCheck, Findings
from fastgpt_jax.cli.machine import Machine, read_machine
from fastgpt_jax.cli.packages import OPTIONAL, REQUIRED, Probed, probe_all, version_of
from fastgpt_jax.cli.probe import DEVICES, KERNELS
from fastgpt_jax.cli.tables import format_bytes, format_seconds, format_table

COMPILER = "fastgpt_jax.compiler.compile"


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_string("artifact", None, "Artifact folder to check.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    artifact: str | None
    json: bool


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "doctor",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        positional="artifact",
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Prints what was found."""
    findings = examine(options.artifact)
    print(json.dumps(_as_json(findings), indent=2) if options.json else _as_text(findings))
    return EXIT_USER_ERROR if findings.artifact is not None and findings.artifact.error is not None else 0


def examine(artifact: str | None = None) -> Findings:
    """Looks at the machine and the installation, and at an artifact where one is named."""
    modules = {**REQUIRED, **{name: module for name, (module, _) in OPTIONAL.items()}}
    found = probe_all([*REQUIRED.values(), DEVICES, COMPILER, KERNELS, *(module for module, _ in OPTIONAL.values())])
    named = {name: dataclasses.replace(found[module], version=version_of(name)) for name, module in modules.items()}
    return Findings(
        platform.python_version(),
        version_of("fastgpt-jax") or "not installed, run from a checkout",
        {name: named[name] for name in REQUIRED},
        {name: named[name] for name in OPTIONAL},
        found[DEVICES],
        found[COMPILER],
        found[KERNELS],
        read_machine(),
        None if artifact is None else _check(artifact, [found["jax"], found[DEVICES]]),
    )


def _check(artifact: str, needed: Sequence[Probed]) -> ArtifactCheck:
    """Checks an artifact, unless what the check needs would take this process down."""
    broken = [found.error or "jax is not installed" for found in needed if not found.is_usable]
    if broken:
        return ArtifactCheck(artifact, f"cannot be checked: {broken[0]}")
    try:
        # It needs JAX, which the rest of this tool does without.
        from fastgpt_jax.cli.artifact_check import check_artifact  # noqa: PLC0415
    except ImportError as error:
        return ArtifactCheck(artifact, f"cannot be checked: {error}")
    return check_artifact(artifact)


def _as_text(findings: Findings) -> str:
    sections = {
        "versions": [
            ("python", findings.python),
            ("fastgpt-jax", findings.fastgpt_jax),
            *((name, _describe(found)) for name, found in findings.packages.items()),
        ],
        "optional": [(name, _describe(found), f"({OPTIONAL[name][1]})") for name, found in findings.extras.items()],
        "devices": _device_rows(findings.devices),
        "machine": _machine_rows(findings.machine),
        "serving": [
            ("compiler", _describe(findings.compiler, "usable")),
            ("kernels", _describe_kernels(findings.kernels)),
        ],
    }
    if findings.artifact is not None:
        sections[f"artifact {findings.artifact.path}"] = _artifact_rows(findings.artifact)
    if findings.problems:
        sections["problems"] = [(problem,) for problem in findings.problems]
    return "\n".join(f"{name}\n{format_table(rows, indent='  ')}" for name, rows in sections.items())


def _describe(found: Probed, usable: str = "usable") -> str:
    """A version, or why there is none to use."""
    if found.is_missing:
        return "not installed"
    version = found.version or usable
    return version if found.error is None else f"{version}, broken: {found.error}"


def _describe_kernels(found: Probed) -> str:
    return f"native, {found.version}" if found.error is None else "XLA only"


def _device_rows(devices: Probed) -> list[tuple[str, ...]]:
    """A row a kind of device: where it is, how many, and the memory of each."""
    if devices.error is not None:
        return [("none", devices.error)]
    kinds = [(found["platform"], found["kind"], found["memory_bytes"]) for found in devices.devices]
    return [
        (
            where,
            kind,
            f"x {kinds.count((where, kind, size))}",
            "the machine's memory" if size is None else f"{format_bytes(size)} each",
        )
        for where, kind, size in dict.fromkeys(kinds)
    ]


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    limit = machine.memory_limit_bytes
    return [
        ("processor", f"{machine.cpu_model or 'not known'}, {machine.architecture}"),
        ("features", " ".join(machine.cpu_features) or "none that is known to matter"),
        (
            "cores",
            f"{_or_unknown(machine.num_cores)}, of which this process may use {_or_unknown(machine.usable_cores)}",
        ),
        ("memory", f"{_size(machine.memory_bytes)}, {_size(machine.available_bytes)} available"),
        ("memory limit", "none" if limit is None else format_bytes(limit)),
    ]


def _artifact_rows(check: ArtifactCheck) -> list[tuple[str, str]]:
    rows = []
    if check.model is not None and check.num_bytes is not None and check.verified_s is not None:
        rows = [
            ("model", f"{check.model}, {check.num_entry_points} entry points, {format_bytes(check.num_bytes)}"),
            ("bytes", f"all are what was written (read in {format_seconds(check.verified_s)})"),
            *(("warning", f"{clause}; it would be compiled anew at every start") for clause in check.mismatches),
        ]
        if check.is_fingerprint_checked:
            rows.append(("fingerprint", "holds: it computes here what it did when it was compiled"))
        elif check.mismatches:
            rows.append(("fingerprint", "not run: the code is for another environment"))
    return rows if check.error is None else [*rows, ("error", check.error)]


def _size(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else format_bytes(num_bytes)


def _or_unknown(number: float | None) -> str:
    return "not known" if number is None else f"{number:g}"


def _as_json(findings: Findings) -> dict[str, Any]:
    def package(found: Probed) -> dict[str, Any]:
        return {"version": found.version, "is_usable": found.is_usable, "error": found.error}

    return {
        "python": findings.python,
        "fastgpt_jax": findings.fastgpt_jax,
        "packages": {name: package(found) for name, found in findings.packages.items()},
        "optional": {name: package(found) for name, found in findings.extras.items()},
        "devices": [dict(device) for device in findings.devices.devices],
        "machine": dataclasses.asdict(findings.machine),
        "compiler": {"is_usable": findings.compiler.is_usable, "error": findings.compiler.error},
        "kernels": ["XLA"] if findings.kernels.error is not None else ["XLA", f"native {findings.kernels.version}"],
        "artifact": None if findings.artifact is None else dataclasses.asdict(findings.artifact),
        "problems": findings.problems,
    }
