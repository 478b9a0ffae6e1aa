"""`fastgpt bench serve`: load on an OpenAI-compatible server, at rising rates or numbers of clients.

    fastgpt bench serve --base_url http://127.0.0.1:8000 --model M --rates 1,2,4,8 --picture load.png
    fastgpt bench serve --base_url http://127.0.0.1:8000 --model M --concurrency 1,8,32
    fastgpt bench serve --base_url http://127.0.0.1:8000 --model M --trace trace.csv --max_len 512

A table goes to standard output, a line of JSON a level to --jsonl. With --rates requests arrive one independent of the
other and do not wait for answers; with --concurrency each client sends its next request when it has its answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fastgpt_jax.bench.client import Client
from fastgpt_jax.bench.load import closed_loop, open_loop
from fastgpt_jax.bench.picture import draw
from fastgpt_jax.bench.record import Objective, Record, summarize
from fastgpt_jax.bench.workload import Asked
from fastgpt_jax.cli.bench_rows import append_jsonl
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.tables import format_table
from fastgpt_jax.cli.workload_flags import WorkloadOptions, add_workload_flags, make_requests, parse_levels
from fastgpt_jax.errors import UserError

_WARMUP_SEED = 2**20
"""Added to the seed, so that no measured request finds its prompt warm."""

Load = Callable[[Sequence[Asked], Callable[[Asked], Awaitable[Record]]], Awaitable[list[Record]]]


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, number = flags.DEFINE_string, flags.DEFINE_float
    text("base_url", "http://127.0.0.1:8000", "Of the server, without /v1.", flag_values=values)
    text("model", None, "What the server calls it.", required=True, flag_values=values)
    text("api_key_file", None, "File whose first line is the key.", flag_values=values)
    flags.DEFINE_list("rates", [], "Requests a second, level by level.", flag_values=values)
    flags.DEFINE_list("concurrency", [], "Clients at once, level by level.", flag_values=values)
    flags.DEFINE_integer("seeds", 1, "Runs of each level, each of another seed.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("warmup", 4, "Requests before the clock starts.", lower_bound=0, flag_values=values)
    number("slo_ttft_ms", None, "Of a good answer, at most.", lower_bound=0.0, flag_values=values)
    number("slo_tpot_ms", None, "Of a good answer, at most.", lower_bound=0.0, flag_values=values)
    number("timeout_s", 600.0, "A piece of an answer must come within.", lower_bound=0.001, flag_values=values)
    flags.DEFINE_bool("ignore_eos", True, "Ask for answers of full length.", flag_values=values)
    text("jsonl", None, "File that a line of JSON a run is added to.", flag_values=values)
    text("picture", None, "PNG or SVG of latency against load.", flag_values=values)
    add_workload_flags(values)
    return values


@dataclasses.dataclass(frozen=True)
class Options(WorkloadOptions):
    """The flags, parsed."""

    base_url: str
    model: str
    api_key_file: str | None
    rates: tuple[str, ...]
    concurrency: tuple[str, ...]
    seeds: int
    warmup: int
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    timeout_s: float
    ignore_eos: bool
    jsonl: str | None
    picture: str | None


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "bench serve",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Measures every level and prints a table."""
    name, levels = _levels(options)
    rows = asyncio.run(_measure(options, name, levels))
    print(format_table([_cells(row) for row in rows], _COLUMNS))
    append_jsonl(options.jsonl, rows)
    if options.picture is not None:
        draw(Path(options.picture), _medians(rows), name)
    return 0


def _levels(options: Options) -> tuple[str, list[float]]:
    """What the load is called, and its levels; a trace is one level, at the speed it is replayed."""
    if options.trace is not None:
        if options.rates:
            raise UserError("--rates says when requests arrive, and so does --trace; give one (or --trace_speed)")
        if not options.concurrency:
            return "times as fast as recorded", [options.trace_speed]
    if bool(options.rates) == bool(options.concurrency):
        raise UserError("give --rates (arrivals a second) or --concurrency (clients at once)")
    if options.rates:
        return "requests/s asked", parse_levels("rates", options.rates)
    levels = parse_levels("concurrency", options.concurrency)
    if any(level != int(level) for level in levels):
        raise UserError(f"--concurrency must be whole numbers of clients, got {','.join(options.concurrency)}")
    return "clients", levels


async def _measure(options: Options, name: str, levels: Sequence[float]) -> list[dict[str, Any]]:
    client = Client(
        options.base_url,
        options.model,
        api_key=_api_key(options.api_key_file),
        timeout_s=options.timeout_s,
        ignore_eos=options.ignore_eos,
    )
    objective = Objective(_seconds(options.slo_ttft_ms), _seconds(options.slo_tpot_ms))
    rows = []
    try:
        await client.check()
        if options.warmup:
            warm = dataclasses.replace(options, num_requests=options.warmup, cancel_share=0.0)
            await closed_loop(make_requests(warm, None, seed_offset=_WARMUP_SEED), client.ask, options.warmup)
        for index, level in enumerate(levels):
            for run in range(options.seeds):
                # No two runs ask the same prompts, since the second would find them in the server's caches.
                offset = index * options.seeds + run
                print(f"{name}: {level:g}, seed {options.seed + offset}", file=sys.stderr, flush=True)
                requests = make_requests(options, level if options.rates else None, offset)
                records = await _load(options, level)(requests, client.ask)
                facts = {"load_name": name, "load": level, "seed": options.seed + offset}
                rows.append({**facts, **summarize(records, objective)})
    finally:
        await client.close()
    return rows


def _load(options: Options, level: float) -> Load:
    return functools.partial(closed_loop, concurrency=int(level)) if options.concurrency else open_loop


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _api_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"--api_key_file {path} has no first line to read: {error}") from None


_COLUMNS = ("load", "seed", "done", "failed", "req/s", "good/s", "tok/s", "TTFT ms 50/90/99", "TPOT ms 50/90/99")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['load']:g}",
        str(row["seed"]),
        str(row["num_whole"]),
        str(row["num_failed"]),
        f"{row['requests_per_s']:.2f}",
        f"{row['goodput_per_s']:.2f}",
        f"{row['output_tokens_per_s']:.1f}",
        *(" / ".join(f"{v:.1f}" for v in (row[name] or {}).values()) or "-" for name in ("ttft_ms", "tpot_ms")),
    )


def _medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each level the run whose output rate is the median of its seeds."""
    found = []
    for level in dict.fromkeys(row["load"] for row in rows):
        same = sorted((row for row in rows if row["load"] == level), key=lambda row: row["output_tokens_per_s"])
        found.append(same[(len(same) - 1) // 2])
    return found
