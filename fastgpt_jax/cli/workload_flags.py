"""The flags that say what a bench asks: lengths, prefixes, cancellations, or a recorded trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from fastgpt_jax.bench.workload import Asked, Lengths, Workload, replay
from fastgpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WorkloadOptions:
    """The flags, parsed; a part of a tool's own."""

    num_requests: int
    prompt_len: str
    output_len: str
    vocab_size: int
    prefix_len: int
    num_prefixes: int
    cancel_share: float
    trace: str | None
    trace_speed: float
    max_len: int
    seed: int


def add_workload_flags(values: flags.FlagValues) -> None:
    """Defines the flags."""
    integer, number, text = flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_string
    integer("num_requests", 64, "Requests of a run.", lower_bound=1, flag_values=values)
    text("prompt_len", "16-64", "Tokens of a prompt, or a range of them.", flag_values=values)
    text("output_len", "16-64", "Tokens of an answer, or a range of them.", flag_values=values)
    integer("vocab_size", 256, "Prompts are random ids below this.", lower_bound=4, flag_values=values)
    integer("prefix_len", 0, "Tokens that prompts begin with in common.", lower_bound=0, flag_values=values)
    integer("num_prefixes", 1, "Groups of prompts with a prefix of their own.", lower_bound=1, flag_values=values)
    number("cancel_share", 0.0, "Share of clients that leave early.", 0.0, 1.0, flag_values=values)
    text("trace", None, "Recorded requests in place of drawn ones: CSV or JSON lines.", flag_values=values)
    number("trace_speed", 1.0, "Times as fast as recorded.", lower_bound=1e-6, flag_values=values)
    integer("max_len", 512, "Longer requests of a trace are left out, in tokens.", lower_bound=2, flag_values=values)
    integer("seed", 0, "Decides what is drawn.", lower_bound=0, flag_values=values)


def make_requests(options: WorkloadOptions, rate: float | None, seed_offset: int = 0) -> list[Asked]:
    """The requests that the flags ask for, arriving at a rate where one is given and no trace says when."""
    seed = options.seed + seed_offset
    if options.trace is not None:
        if (options.prefix_len, options.cancel_share) != (0, 0.0):
            raise UserError("--prefix_len and --cancel_share draw requests, and --trace brings its own; give one")
        return replay(
            Path(options.trace),
            num_requests=options.num_requests,
            max_len=options.max_len,
            vocab_size=options.vocab_size,
            speed=options.trace_speed,
            seed=seed,
        )
    workload = Workload(
        options.num_requests,
        parse_lengths("prompt_len", options.prompt_len),
        parse_lengths("output_len", options.output_len),
        options.vocab_size,
        options.prefix_len,
        options.num_prefixes,
        options.cancel_share,
    )
    return workload.make(seed, rate)


def parse_lengths(name: str, text: str) -> Lengths:
    """Reads `64` or `16-64`."""
    low, dash, high = text.partition("-")
    try:
        lengths = Lengths(int(low), int(high if dash else low))
    except ValueError:
        lengths = Lengths(0, 0)
    if not 1 <= lengths.low <= lengths.high:
        raise UserError(f"--{name} must be a number of tokens such as 64, or a range such as 16-64, got {text!r}")
    return lengths


def parse_levels(name: str, words: tuple[str, ...]) -> list[float]:
    """Reads the levels of a sweep, numbers above 0."""
    try:
        levels = [float(word) for word in words]
    except ValueError:
        levels = [0.0]
    if not all(0 < level < float("inf") for level in levels):
        raise UserError(f"--{name} must be numbers above 0 with commas, as in 1,2,4, got {','.join(words)!r}")
    return levels
