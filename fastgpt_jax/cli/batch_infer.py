"""`fastgpt batch_infer`: answers a file of requests, and goes on where it was stopped.

    fastgpt batch_infer --model ARTIFACT --input requests.jsonl --output answers.jsonl

Both files hold a JSON object a line, in the form of OpenAI's batches: `custom_id`, `method`, `url` and `body` in;
`custom_id`, `response` and `error` out, in the order in which answers come. Stopped at any moment, the same command
answers what is left, each request once. Ctrl-C finishes what is under way; a second one does not wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from fastgpt_jax.artifact.loading import ON_MISMATCH, is_artifact
from fastgpt_jax.artifact.manifest import read_manifest
from fastgpt_jax.artifact.verify import LEVELS
from fastgpt_jax.batch.in_process import InProcess
from fastgpt_jax.batch.job import Tally, run_job
from fastgpt_jax.batch.journal import Journal
from fastgpt_jax.batch.requests import MAX_LINE_BYTES, InputFacts, read_requests, survey
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.devices import count_mesh_devices, make_virtual_devices
from fastgpt_jax.cli.exit_codes import EXIT_INTERRUPT
from fastgpt_jax.cli.serve_artifact import find_or_compile
from fastgpt_jax.engine.args import make_engine_args
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.app import make_app
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.settings import ServerSettings

ROWS_AHEAD = 4
"""Requests under way for each that may run, so that the engine never waits for the file."""
UNLIMITED = 2**62
"""Of what may wait: the window limits it."""
PROGRESS_INTERVAL_S = 10.0


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, "Artifact, model folder or hub id.", required=True, flag_values=values)
    flags.DEFINE_alias("model_path", "model", flag_values=values)
    text("input", None, "File with a request a line.", required=True, flag_values=values)
    text("output", None, "File that answers are added to.", required=True, flag_values=values)
    text("served_model_name", None, "What requests call the model (default: its name).", flag_values=values)
    text("dtype", "auto", "Of a model folder: auto, float32, bfloat16 or float16.", flag_values=values)
    integer("batch_size", None, "Requests that run together.", lower_bound=1, flag_values=values)
    flags.DEFINE_alias("max_num_seqs", "batch_size", flag_values=values)
    integer("max_model_len", None, "Tokens of prompt and output together.", lower_bound=2, flag_values=values)
    integer("tensor_parallel_size", None, "Devices that share every layer.", lower_bound=1, flag_values=values)
    flags.DEFINE_alias("tensor_parallel", "tensor_parallel_size", flag_values=values)
    integer("pipeline_parallel_size", 1, "Stages of layers; only 1 is there yet.", lower_bound=1, flag_values=values)
    flags.DEFINE_alias("pipeline_parallel", "pipeline_parallel_size", flag_values=values)
    flags.DEFINE_enum("verify", None, LEVELS, "Of an artifact, what is checked first.", flag_values=values)
    flags.DEFINE_enum("on_mismatch", None, ON_MISMATCH, "With an artifact of another environment.", flag_values=values)
    integer("seed", 0, "Decides the draws of requests that bring no seed.", lower_bound=0, flag_values=values)
    text("cache_folder", "~/.cache/fastgpt-jax", "Where compiled models are kept.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    input: str
    output: str
    served_model_name: str | None
    dtype: str
    batch_size: int | None
    max_model_len: int | None
    tensor_parallel_size: int | None
    pipeline_parallel_size: int
    verify: str | None
    on_mismatch: str | None
    seed: int
    cache_folder: str


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "batch_infer",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Answers what has no answer yet; every mistake that can be known is told before the model is loaded."""
    if options.pipeline_parallel_size > 1:
        raise UserError(
            f"--pipeline_parallel_size={options.pipeline_parallel_size} is not supported in this version; leave it at 1"
        )
    facts = survey(Path(options.input))
    artifact = _find_artifact(options)
    manifest = read_manifest(artifact)
    name = options.served_model_name or manifest.model.name
    identity = {"input": facts.sha256, "model": manifest.model.digest, "model_name": name, "seed": options.seed}
    with Journal(Path(options.output), identity=identity, last_number=facts.last_number) as journal:
        if journal.num_done:
            print(f"{journal.num_done} of {facts.num_lines} requests have their answers", file=sys.stderr)
        if journal.num_done >= facts.num_lines:
            return 0
        make_virtual_devices(count_mesh_devices(str(artifact)))
        engine = LLMEngine.from_engine_args(make_engine_args(str(artifact), _engine_options(options)))
        try:
            tally, is_stopped = asyncio.run(_serve(engine, name, Path(options.input), journal, facts))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    _report(tally)
    if is_stopped:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPT
    return 0


def _find_artifact(options: Options) -> Path:
    """The artifact that the flags name, compiled first where the model is none."""
    if is_artifact(options.model):
        return Path(options.model)
    for flag in ("verify", "on_mismatch"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag} is for artifacts, and {options.model} is none; fastgpt compile makes one")
    asked = {
        "dtype": None if options.dtype == "auto" else options.dtype,
        "max_num_seqs": options.batch_size,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": options.tensor_parallel_size,
    }
    return find_or_compile(options.model, asked, Path(options.cache_folder).expanduser())


def _engine_options(options: Options) -> dict[str, object]:
    """What an artifact is checked against, and how it is loaded."""
    asked = {
        "max_num_seqs": options.batch_size,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": options.tensor_parallel_size,
        "verify": options.verify,
        "on_mismatch": options.on_mismatch,
        "dtype": options.dtype if is_artifact(options.model) else None,
        "seed": options.seed,
    }
    return {name: value for name, value in asked.items() if value is not None}


async def _serve(
    engine: LLMEngine, name: str, requests: Path, journal: Journal, facts: InputFacts
) -> tuple[Tally, bool]:
    """Runs the job over a server's routes; returns what was done, and whether a signal ended it early."""
    window = ROWS_AHEAD * engine.compiled.max_num_seqs
    settings = ServerSettings(served_model_names=(name,), max_body_bytes=MAX_LINE_BYTES)
    llm = AsyncLLM(engine, max_queue_len=UNLIMITED, max_queued_tokens=UNLIMITED, model_name=name)
    signals = _Signals()
    try:
        with _progress(journal, facts) as progress:
            async with InProcess(make_app(llm, settings)) as call:
                tally = await run_job(
                    read_requests(requests),
                    journal,
                    call,
                    window=window,
                    should_stop=lambda: signals.num_seen > 0,
                    report=functools.partial(_advance, progress),
                )
        return tally, journal.num_done < facts.num_lines
    finally:
        await llm.close()


class _Signals:
    """The first signal stops the reading of requests; the second ends the job where it is."""

    def __init__(self):
        self.num_seen = 0
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self.num_seen += 1
        if self.num_seen == 1:
            print("\nfinishing what is under way; once more does not wait", file=sys.stderr)
        elif self._task is not None:
            self._task.cancel()


def _progress(journal: Journal, facts: InputFacts) -> tqdm:
    """A bar with the time left; where standard error is no terminal, a line every few seconds."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=facts.num_lines,
        initial=journal.num_done,
        unit=" requests",
        mininterval=0.1 if is_terminal else PROGRESS_INTERVAL_S,
        dynamic_ncols=is_terminal,
        ascii=not is_terminal,
    )


def _advance(progress: tqdm, tally: Tally) -> None:
    progress.set_postfix(tally.counts, refresh=False)
    progress.update()


def _report(tally: Tally) -> None:
    seconds = max(tally.seconds, 1e-9)
    print(
        f"{tally.num_answered} requests in {tally.seconds:.1f} s: {tally.num_answered / seconds:.2f} requests/s, "
        f"{tally.prompt_tokens / seconds:.1f} prompt and {tally.generated_tokens / seconds:.1f} generated tokens/s"
    )
    failed = {f"status {s}" if s else "no request": n for s, n in sorted(tally.statuses.items()) if s != 200}
    if failed:
        told = ", ".join(f"{n} with {name}" for name, n in failed.items())
        print(f"{tally.num_failed} failed ({told}); their lines say why")
