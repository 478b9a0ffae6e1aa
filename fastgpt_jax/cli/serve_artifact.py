"""An artifact of whatever `--model` names: itself, or one that is compiled into a cache folder first.

Knows no server. The one idea: the folder's name is a digest of the model's files, of the options and of the program
that compiles, so that what is found under it is what would be made again, and nothing is served that is out of date.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

import fastgpt_jax
from fastgpt_jax.artifact.digests import digest_bytes, digest_files
from fastgpt_jax.artifact.environment import current_environment
from fastgpt_jax.artifact.loading import is_artifact
from fastgpt_jax.cli.common import to_options
from fastgpt_jax.errors import UserError

PACKAGES = ("fastgpt_jax", "passes", "sharding")


def find_or_compile(model: str, options: Mapping[str, Any], cache_folder: Path) -> Path:
    """Returns the artifact of a model that is none.

    Args:
      options: Flags of `fastgpt compile` by name; those that are None are left as they are.
    """
    # What is compiled already needs neither the compiler nor a model library.
    from fastgpt_jax.cli import compile as compile_tool  # noqa: PLC0415

    given = {name: value for name, value in options.items() if value is not None and value is not False}
    source = _local_source(model)
    digest = _digest(model, source, given)
    output = cache_folder / f"{_plain(compile_tool.model_name(model))}-{digest[:16]}"
    # A function's program is known when it has been traced, and no sooner; code that was compiled is found again.
    if source is not None and is_artifact(output):
        print(f"compiled before: {output}", file=sys.stderr)
        return output
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    values = compile_tool.make_flags()
    try:
        values(["compile", f"--model={model}", f"--output={output}", "--overwrite", "--verify=none", *words])
    except flags.Error as error:
        raise UserError(str(error)) from error
    with contextlib.redirect_stdout(sys.stderr):
        compile_tool.execute(to_options(values, compile_tool.Options))
    return output


def _local_source(model: str) -> Path | None:
    """The folder or file whose bytes are the whole model; None for a function, or what is yet to be fetched."""
    from fastgpt_jax.checkpoint.hub import find_on_hub, parse_model_id  # noqa: PLC0415
    from fastgpt_jax.cli.model_source import hub_settings, is_function_spec  # noqa: PLC0415

    if is_function_spec(model):
        return None
    path = Path(model)
    if not path.exists() and (model_id := parse_model_id(model)) is not None:
        path = find_on_hub(model_id, hub_settings(os.environ))
    if not path.exists():
        raise UserError(
            f"there is no model {model}; --model takes an artifact, a model folder, a hub's id or FILE.py:FUNCTION"
        )
    return path


def _digest(model: str, source: Path | None, options: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what the artifact holds."""
    facts = {
        "model": str(Path(model).resolve()) if source is None else _digest_tree(source),
        "options": {name: _digest_tree(Path(value)) if _is_path(value) else value for name, value in options.items()},
        "environment": vars(current_environment()),
        "versions": {name: importlib.metadata.version(name) for name in ("fastgpt-jax", "flax", "numpy")},
        "compiler": _compiler_stamp(),
    }
    return digest_bytes(json.dumps(facts, sort_keys=True).encode())


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).exists()


def _digest_tree(source: Path) -> str:
    """SHA-256 over names and bytes of a file, or of all files of a folder; hidden ones are no part of a model."""
    root = source if source.is_dir() else source.parent
    files = sorted(path for path in root.rglob("*") if path.is_file()) if source.is_dir() else [source]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    pieces = zip(files, digest_files(files), strict=True)
    return digest_bytes("".join(f"{path.relative_to(root)}\0{digests}" for path, digests in pieces).encode())


def _compiler_stamp() -> str:
    """Names, sizes and times of our own sources: in a checkout they change under one version."""
    folder = Path(fastgpt_jax.__file__).resolve().parent.parent
    files = sorted(path for name in PACKAGES for path in (folder / name).rglob("*.py"))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return digest_bytes("".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats).encode())


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
