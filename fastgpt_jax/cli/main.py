"""`fastgpt TOOL ...`: finds the tool and imports nothing else."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastgpt_jax.cli.exit_codes import EXIT_INTERRUPT, EXIT_USER_ERROR

TOOLS: Mapping[str, str] = MappingProxyType(
    {
        "batch_infer": "answer a file of requests, each once, whenever it is stopped",
        "bench": "measure a server, an engine or a start",
        "compile": "write an artifact that a fresh process serves at once",
        "demo": "explain, compile and run the embedded model",
        "doctor": "print what this machine and installation can do, and check an artifact",
        "explain": "print what will be cached, carried, recognised or refused in a model",
        "generate": "continue prompts with a model",
        "inspect": "look through a model: its decode step after each pass, beside the lines it came from",
        "serve": "serve a model to OpenAI's clients",
        "train": "train a small model from a text file",
    }
)
"""Name of a tool, which is that of its module in this package -> what it does."""


def main(argv: Sequence[str]) -> int:
    """Runs the tool that the first word names; returns the exit code."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_USER_ERROR
    tool = argv[0]
    if tool not in TOOLS:
        nearest = difflib.get_close_matches(tool, TOOLS, n=1, cutoff=0.0)[0]
        print(f"fastgpt: unknown tool {tool!r}; the nearest is {nearest!r} (see fastgpt --help)", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        return importlib.import_module(f"fastgpt_jax.cli.{tool}").main(argv[1:])
    except KeyboardInterrupt:  # while the tool's libraries are imported, which takes seconds
        print(file=sys.stderr)
        return EXIT_INTERRUPT


def console() -> None:
    """The installed command `fastgpt`."""
    sys.exit(main(sys.argv[1:]))


def serve_console() -> None:
    """The installed command `fastgpt-server`: `fastgpt serve` by a name of its own."""
    sys.exit(main(["serve", *sys.argv[1:]]))


def _usage() -> str:
    width = max(map(len, TOOLS))
    tools = "\n".join(f"  {name.ljust(width)}  {purpose}" for name, purpose in TOOLS.items())
    return f"usage: fastgpt TOOL [--flag VALUE ...]\n\n{tools}\n\nfastgpt TOOL --help lists a tool's flags."
