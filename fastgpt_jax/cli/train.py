"""`fastgpt train`: a text file becomes a small model that every other tool can serve.

    fastgpt train --config configs/demo.py --text tinyshakespeare.txt --output out/demo

Every setting of the config can be changed on the command line (`--config.steps=100`); a key that there is not is an
error. `--resume` continues a run that was stopped, exactly as if it had not been.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.config_file import load_config, merge
from fastgpt_jax.training import TrainSettings, train_from_text
from fastgpt_jax.training.data import read_text


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed; each setting has one, `config.<key>`, that is None unless given."""
    values = flags.FlagValues()
    text = flags.DEFINE_string
    text("config", None, "File with get_config(), like configs/demo.py.", required=True, flag_values=values)
    text("text", None, "UTF-8 text file to learn.", required=True, flag_values=values)
    text("output", None, "Folder of the run; the model lies in its model/.", required=True, flag_values=values)
    flags.DEFINE_bool("resume", False, "Continue from the newest checkpoint in --output.", flag_values=values)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, kind, default in _settings(TrainSettings(), "config"):
        define[kind](name, None, f"In place of the config's; where it has none, {default}.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed, without those that change a setting."""

    config: str
    text: str
    output: str
    resume: bool


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "train",
        make_flags(),
        lambda values: execute(to_options(values, Options), _overrides(values)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options, overrides: Mapping[str, Any]) -> int:
    """Trains and prints where the model lies and what it measured."""
    settings = TrainSettings.from_mapping(merge(load_config(options.config), overrides))
    text = read_text(options.text)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("fastgpt_jax").setLevel(logging.INFO)
    result = train_from_text(text, settings, Path(options.output), resume=options.resume)
    print(
        f"{result.num_parameters} parameters, training loss {result.train_loss:.4f}, validation loss "
        f"{result.valid_loss:.4f} nats a token ({result.valid_bits_per_byte:.4f} bits a byte), {result.seconds:.0f} s",
        file=sys.stderr,
    )
    print(result.folder)
    return 0


def _settings(group: Any, path: str) -> Iterator[tuple[str, type, Any]]:
    """Yields name, type and default of every setting, groups entered."""
    types = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        name, default = f"{path}.{field.name}", getattr(group, field.name)
        if dataclasses.is_dataclass(default):
            yield from _settings(default, name)
        else:
            yield name, types[field.name], default


def _overrides(values: flags.FlagValues) -> dict[str, Any]:
    """The settings given as flags, by their dotted key."""
    names = (name for name, _, _ in _settings(TrainSettings(), "config"))
    return {name.removeprefix("config."): values[name].value for name in names if values[name].value is not None}
