"""`fastgpt bench`: measures a server, an engine, or a start.

fastgpt bench serve --base_url http://127.0.0.1:8000 --model M --rates 1,2,4,8
fastgpt bench offline --model ARTIFACT --num_requests 64
fastgpt bench startup --model ARTIFACT
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastgpt_jax.cli.exit_codes import EXIT_USER_ERROR

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "load on a server over HTTP: latency, throughput, goodput",
        "offline": "throughput of an engine in this process",
        "startup": "from process start to first token",
    }
)


def main(argv: Sequence[str]) -> int:
    """Runs the kind that the first word names; returns the exit code."""
    if argv and argv[0] in KINDS:
        return importlib.import_module(f"fastgpt_jax.cli.bench_{argv[0]}").main(argv[1:])
    is_help = bool(argv) and argv[0] in ("--help", "-h", "help")
    if argv and not is_help:
        known = ", ".join(KINDS)
        print(f"fastgpt bench: measures one of {known}, got {argv[0]!r} (see fastgpt bench --help)", file=sys.stderr)
        return EXIT_USER_ERROR
    kinds = "\n".join(f"  {name.ljust(8)}  {purpose}" for name, purpose in KINDS.items())
    text = f"usage: fastgpt bench KIND [--flag VALUE ...]\n\n{kinds}\n\nfastgpt bench KIND --help lists its flags."
    print(text, file=sys.stdout if is_help else sys.stderr)
    return 0 if is_help else EXIT_USER_ERROR
