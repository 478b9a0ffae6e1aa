"""Parsing, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from absl import flags

from fastgpt_jax.cli import main as fastgpt
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.errors import UserError
from passes.incremental.errors import NotServable


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    max_tokens: int
    stream: bool
    prompt: tuple[str, ...]


def parse(*argv, body=None, positional=None):
    """Runs a little tool; returns its exit code and the options it saw."""
    values, seen = flags.FlagValues(), []
    flags.DEFINE_string("model", None, "A model.", required=True, flag_values=values)
    flags.DEFINE_integer("max_tokens", 7, "Tokens.", flag_values=values)
    flags.DEFINE_bool("stream", False, "Stream.", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "Prompts.", flag_values=values)

    def default_body(parsed):
        seen.append(to_options(parsed, Options))

    code = run("tool", values, body or default_body, argv, positional=positional, description="Does a thing.")
    return code, seen[0] if seen else None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model", "m"], Options("m", 7, False, ())),
        (["--model=m", "--max-tokens", "3", "--stream"], Options("m", 3, True, ())),
        (["--model=m", "--max_tokens=3", "--no-stream"], Options("m", 3, False, ())),
        (["--prompt", "--a-b", "--prompt=c-d", "--model", "x-y"], Options("x-y", 7, False, ("--a-b", "c-d"))),
        (["--stream", "--model", "m"], Options("m", 7, True, ())),
    ],
)
def test_dashes_stand_for_underscores_in_names_alone(argv, expected):
    assert parse(*argv) == (0, expected)


def test_a_positional_stands_for_its_flag():
    assert parse("m", "--max-tokens", "2", positional="model") == (0, Options("m", 2, False, ()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "fastgpt tool: --model must be given"),
        (["--model=m", "--max_token=3"], "Did you mean"),
        (["--model=m", "--max_tokens=many"], "max_tokens"),
        (["--model=m", "word"], "unexpected argument 'word'"),
        (["--model"], "model"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(argv, message, capsys):
    assert parse(*argv)[0] == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such\nfolder"), 2, "fastgpt tool: no such folder\n"),
        (NotServable("looks ahead"), 2, "looks ahead"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_what_the_user_can_mend_never_shows_a_traceback(error, code, message, capsys):
    def body(values):
        raise error

    assert parse("--model=m", body=body)[0] == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_a_mistake_of_ours_is_not_hidden():
    def body(values):
        raise ValueError("a broken invariant")

    with pytest.raises(ValueError, match="a broken invariant"):
        parse("--model=m", body=body)


def test_help_lists_the_flags(capsys):
    assert parse("--help")[0] == 0
    out = capsys.readouterr().out
    assert "Does a thing." in out and "--max_tokens  Tokens. (default: 7)" in out
    assert "--model       A model. (required)" in out and "--prompt      Prompts.\n" in out


@pytest.mark.parametrize(("output", "code"), [("/dev/full", 2), (None, 141)])
def test_output_that_nobody_takes_is_no_traceback(output, code):
    program = (
        "import sys; from absl import flags; from fastgpt_jax.cli.common import run\n"
        "sys.exit(run('tool', flags.FlagValues(), lambda values: print('text'), []))"
    )
    with open(output or os.devnull, "w") as file:
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=file if output else write_end, stderr=subprocess.PIPE, text=True
        )
        os.close(write_end)
    assert done.returncode == code
    assert done.stderr.count("\n") == (output is not None) and "Traceback" not in done.stderr


def test_an_interrupt_while_libraries_are_imported_is_no_traceback(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastgpt.importlib, "import_module", interrupt)
    assert fastgpt.main(["generate"]) == 130
    assert capsys.readouterr().err == "\n"


def test_an_unknown_tool_names_the_nearest(capsys):
    assert fastgpt.main(["generat"]) == 2
    assert "the nearest is 'generate'" in capsys.readouterr().err


def test_every_tool_is_listed_and_none_is_imported(capsys):
    assert fastgpt.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {tool} " in out for tool in fastgpt.TOOLS)
    code = (
        "import sys, fastgpt_jax.cli.main as m; m.main(['--help']); print('jax' in sys.modules, 'flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")
