"""What all commands share: parsing, exit codes, and one line for a user's mistake.

The convention of a tool, so that `python tools/x.py` and `fastgpt x` are the same:
  * `fastgpt_jax/cli/x.py` has `make_flags() -> flags.FlagValues`, which defines the tool's own flags anew, a frozen
    dataclass `Options` with a field per flag, `execute(options) -> int | None`, and `main(argv) -> int` whose body is
    `return run("x", make_flags(), lambda values: execute(to_options(values, Options)), argv)`; `argv` holds no program
    name (a tool with a config file takes it as `make_flags(argv)`, for `DEFINE_config_file(sys_argv=["x", *argv])`);
  * `fastgpt_jax/cli/main.py` names it in its table;
  * `tools/x.py` is `sys.exit(main(["x", *sys.argv[1:]]))` of `cli/main.py`, which imports the tool only then.
What a tool makes goes to standard output, all else to standard error. Exit 0 is success, 2 a user's mistake (one
line), 130 an interrupt; a traceback means a mistake of ours.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from absl import flags

from fastgpt_jax.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_INTERRUPT, EXIT_USER_ERROR
from fastgpt_jax.errors import UserError

MAX_HELP_COLUMN = 24

Options = TypeVar("Options")


def run(
    tool: str,
    flag_values: flags.FlagValues,
    body: Callable[[flags.FlagValues], int | None],
    argv: Sequence[str],
    *,
    positional: str | None = None,
    description: str = "",
) -> int:
    """Parses `argv` and runs a tool; returns the exit code.

    Args:
      flag_values: The tool's flags, not parsed yet.
      body: Does the work; None means success.
      positional: Flag that one argument without dashes stands for.
      description: Printed before the flags by `--help`.
    """
    try:
        if any(word in ("--help", "-h", "-help") for word in argv):
            print(_help(tool, flag_values, positional, description))
            _flush_output()
            return 0
        _parse(tool, flag_values, argv, positional)
        code = body(flag_values) or 0
        _flush_output()
        return code
    except flags.Error as error:
        missing = [f"--{name}" for name in flag_values if _is_missing(flag_values[name])]
        message = f"{', '.join(missing)} must be given" if missing else _one_line(error)
        return _fail(tool, f"{message} (see fastgpt {tool} --help)")
    except UserError as error:
        return _fail(tool, _one_line(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPT
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # a full disk, a folder that may not be written
        _discard_output()
        return _fail(tool, f"{_one_line(error)}; check that there is room and permission to write")
    except ValueError as error:
        if not _is_refusal(error):
            raise
        return _fail(tool, str(error))


def to_options(values: flags.FlagValues, kind: Callable[..., Options]) -> Options:
    """Returns the dataclass `kind` with each field taken from the flag of its name; lists become tuples."""
    fields = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        value = getattr(values, field.name)
        fields[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def _parse(tool: str, values: flags.FlagValues, argv: Sequence[str], positional: str | None) -> None:
    values.set_gnu_getopt(True)
    words = list(_with_underscores(argv, values))
    # A leading positional is put behind its flag before parsing, since required flags are checked while parsing.
    if positional is not None and words and not words[0].startswith("-"):
        words[0] = f"--{positional}={words[0]}"
    rest = values([tool, *words])[1:]
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; values follow a flag, as in --prompt {rest[0]!r}")


def _with_underscores(argv: Iterable[str], values: flags.FlagValues) -> Iterable[str]:
    """Yields the words with `-` as `_` in the names of flags, and nowhere else."""
    is_value, is_rest = False, False
    for word in argv:
        if is_value or is_rest or not word.startswith("--"):
            is_value = False
            yield word
            continue
        is_rest = word == "--"
        name, equals, value = word[2:].partition("=")
        renamed = name.replace("-", "_")
        if renamed not in values and renamed.startswith("no_") and _is_boolean(values, renamed[3:]):
            renamed = "no" + renamed[3:]
        name = renamed if renamed in values or "." not in name else name
        is_value = not equals and name in values and not _is_boolean(values, name)
        yield f"--{name}{equals}{value}"


def _is_required(flag: flags.Flag) -> bool:
    return any("other than None" in validator.message for validator in flag.validators)


def _is_missing(flag: flags.Flag) -> bool:
    return _is_required(flag) and flag.value is None


def _flush_output() -> None:
    """Writes what is buffered while a failure can still be told; without a standard output there is nothing to do."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _discard_output() -> None:
    """Sends the rest to nowhere: what takes no more output may not be flushed to at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_boolean(values: flags.FlagValues, name: str) -> bool:
    return name in values and values[name].boolean


def _is_refusal(error: ValueError) -> bool:
    """Whether this is the compiler's NotServable, looked up without importing a compiler that may not be needed."""
    module = sys.modules.get("passes.incremental.errors")
    return module is not None and isinstance(error, module.NotServable)


def _fail(tool: str, message: str) -> int:
    print(f"fastgpt {tool}: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _help(tool: str, values: flags.FlagValues, positional: str | None, description: str) -> str:
    usage = f"usage: fastgpt {tool}" + (f" [{positional.upper()}]" if positional else "") + " [--flag VALUE ...]"
    lines = [usage, "", description.strip(), ""] if description else [usage, ""]
    width = min(max(map(len, values)), MAX_HELP_COLUMN)
    lines += [f"  --{name.ljust(width)}  {_help_of(values[name])}" for name in sorted(values)]
    return "\n".join(lines)


def _help_of(flag: flags.Flag) -> str:
    """Returns a flag's help in one line, with its default or that it is required."""
    text = " ".join((flag.help or "").split()).removesuffix("; repeat this option to specify a list of values")
    if _is_required(flag):
        return f"{text} (required)"
    if flag.default in (None, "", False, []):
        return text
    default = str(flag.default)
    return f"{text} (default: {default if default.isprintable() else repr(default)})"
