"""Our CPU backend beside llama.cpp, OpenVINO GenAI, CTranslate2 and torch, in one run on this machine.

    benchmarks/peers/environment.sh FOLDER                  # once: the other engines, in an environment of their own
    python -m benchmarks.cpu_peers --peers FOLDER --models FOLDER2 --jsonl run.jsonl --picture docs/cpu.png --write_page
    python -m benchmarks.cpu_peers --peers FOLDER --models FOLDER2 --quick
    python -m benchmarks.cpu_peers --peers FOLDER --models FOLDER2 --shapes tinyllama-1.1b --only int8,context

Models have random weights and public shapes, made in FOLDER2 once, for every engine by its own tools. Engines keep
their models loaded and take turns within seconds; each is at the fastest of the settings tried in this run, which are
printed with its version and build flags. Figures are medians beside the memory bandwidth of the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.peers import parts
from benchmarks.peers.artifacts import compile_artifact, context_plan, plan
from benchmarks.peers.bandwidth import Bandwidth
from benchmarks.peers.contests import (
    CONTESTS,
    MEASURES,
    OURS,
    QUICK_MEASURES,
    QUICK_STEPS,
    STEPS,
    Contest,
    Contestant,
    settings,
)
from benchmarks.peers.machine import about_machine
from benchmarks.peers.picture import draw
from benchmarks.peers.protocol import ROOT, EngineFailed, Worker
from benchmarks.peers.report import report, write_page
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.turns import Field
from benchmarks.startup import commit
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.errors import UserError

PARTS = (*CONTESTS, "startup", "exactness", "context", "neighbour")
ENGINES = ("fastgpt", "llama.cpp", "openvino", "ctranslate2", "torch")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    peers: str | None
    models: str
    shapes: tuple[str, ...]
    only: tuple[str, ...]
    engines: tuple[str, ...]
    quick: bool
    rounds: int
    threads: int
    rebuild: bool
    timeout_s: float
    jsonl: str | None
    picture: str | None
    write_page: bool


def make_flags() -> flags.FlagValues:
    """Returns the flags, not parsed."""
    values = flags.FlagValues()
    text, several = flags.DEFINE_string, flags.DEFINE_list
    text("peers", None, "The other engines' environment, made by peers/environment.sh.", flag_values=values)
    text("models", None, "Folder that models are made in, or were.", required=True, flag_values=values)
    several("shapes", ["tinyllama-1.1b", "qwen2-0.5b"], f"Of {', '.join(SHAPES)}.", flag_values=values)
    several("only", list(PARTS), f"Of {', '.join(PARTS)}.", flag_values=values)
    several("engines", list(ENGINES), f"Of {', '.join(ENGINES)}.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Two rounds of the smaller measures, one setting each.", flag_values=values)
    flags.DEFINE_integer("rounds", 5, "Rounds that medians are taken over.", lower_bound=1, flag_values=values)
    threads = len(os.sched_getaffinity(0))
    flags.DEFINE_integer("threads", threads, "Of every engine.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("rebuild", False, "Compile our artifacts again.", flag_values=values)
    flags.DEFINE_float("timeout_s", 900.0, "For one answer, or one artifact.", lower_bound=1.0, flag_values=values)
    text("jsonl", None, "File that every row is added to, a line of JSON each.", flag_values=values)
    text("picture", None, "File of the picture.", flag_values=values)
    flags.DEFINE_bool("write_page", False, "Replace the tables of docs/cpu.md.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return run("cpu_peers", make_flags(), lambda values: execute(to_options(values, Options)), argv)


def execute(options: Options) -> None:
    """Makes what is missing, measures, and tells."""
    check(options)
    bandwidth = Bandwidth(options.threads)
    rows: list[dict[str, Any]] = []
    about = {"row": "run", "commit": commit(), "threads": options.threads, "rounds": rounds(options)}
    _keep(options, rows, {**about, "is_quick": options.quick, **about_machine()})
    for name in options.shapes:
        bench = Bench(options, SHAPES[name], bandwidth)
        try:
            for row in bench.rows():
                _keep(options, rows, {**row, "shape": name})
        finally:
            bench.close()
    lines = list(report(rows))
    print("\n".join(lines), flush=True)
    if options.write_page:
        write_page(lines)
    if options.picture is not None:
        draw(Path(options.picture), rows)


def check(options: Options) -> None:
    """Refuses what cannot be measured before anything is made."""
    for flag, given, known in (
        ("shapes", options.shapes, tuple(SHAPES)),
        ("only", options.only, PARTS),
        ("engines", options.engines, ENGINES),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise UserError(f"--{flag} must be of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    others = [engine for engine in options.engines if engine != OURS]
    if others and (options.peers is None or not python_of(options.peers).is_file()):
        raise UserError(
            f"--peers must be an environment made by benchmarks/peers/environment.sh, got {options.peers}; "
            f"--engines={OURS} needs none"
        )
    allowed = len(os.sched_getaffinity(0))
    if options.threads != allowed and OURS in options.engines:
        raise UserError(
            f"--threads must be the {allowed} cores that this process may run on, which XLA takes all of, got "
            f"{options.threads}; taskset gives it fewer"
        )


def python_of(folder: str) -> Path:
    return Path(folder).absolute() / "bin" / "python"


def rounds(options: Options) -> int:
    return min(options.rounds, 2) if options.quick else options.rounds


class Bench:
    """One shape: its files, its contests, and the parts beside them."""

    def __init__(self, options: Options, shape: Shape, bandwidth: Bandwidth):
        self._options, self._shape, self._bandwidth = options, shape, bandwidth
        self._folder = Path(options.models).absolute() / shape.name
        self._measures = QUICK_MEASURES if options.quick else MEASURES
        self._steps = QUICK_STEPS if options.quick else STEPS
        self._field: Field | None = None
        self._missing: set[str] = set()
        self._rebuilt: set[str] = set()
        self._fastest: dict[str, Mapping[str, Any]] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything that is asked for."""
        self._convert()
        yield from self._ceiling()
        for name in self._chosen_contests():
            contest = self._take_part(CONTESTS[name])
            yield from self._made(contest)
            if name in self._options.only:
                yield from self._contest(contest)
            present = [c for c in contest.contestants if c.label not in self._missing]
            ours = [c for c in present if c.engine == OURS]
            if "startup" in self._options.only:
                longest = max(m.size for m in self._measures if m.kind == "prefill" and m.size <= 512)
                yield from self._in(contest, parts.startup(present, self._open, rounds(self._options), longest))
            if "exactness" in self._options.only:
                for contestant in ours:
                    yield from self._in(contest, parts.exactness(contestant, self._open, self._folder / "hf"))
                yield from self._in(contest, self._same_model(present))
        yield from self._context()
        yield from self._neighbour()

    def close(self) -> None:
        """Ends the processes of a contest that was cut short."""
        if self._field is not None:
            self._field.close()

    def _chosen_contests(self) -> list[str]:
        """Those asked for; where only other parts are, these run for every contest."""
        named = [name for name in CONTESTS if name in self._options.only]
        beside = {"startup", "exactness"} & set(self._options.only)
        return named or (list(CONTESTS) if beside else [])

    def _take_part(self, contest: Contest) -> Contest:
        """The engines asked for; a quick run has artifacts of its own, and tries one setting."""
        chosen = [c for c in contest.contestants if c.engine in self._options.engines]
        if self._options.quick:
            files = [f"{c.file}-quick" if c.engine == OURS else c.file for c in chosen]
            pairs = zip(chosen, files, strict=True)
            chosen = [dataclasses.replace(c, file=file, variants=c.variants[:1]) for c, file in pairs]
        return dataclasses.replace(contest, contestants=tuple(chosen))

    def _made(self, contest: Contest) -> Iterator[dict[str, Any]]:
        """Compiles our artifacts; one that cannot be is a row, and out."""
        for contestant in contest.contestants:
            if contestant.build is None:
                continue
            try:
                self._compile(contestant, plan(contestant.build, self._shape, is_quick=self._options.quick))
            except EngineFailed as error:
                self._missing.add(contestant.label)
                yield {"contest": contest.name, **parts.failed(contestant.label, "compile", error)}

    def _contest(self, contest: Contest) -> Iterator[dict[str, Any]]:
        yield {"row": "limit", "contest": contest.name, "step_bytes": contest.step_bytes(self._shape)}
        field = self._field = Field(self._start, self._bandwidth.measure, steps=self._steps)
        present = [c for c in contest.contestants if c.label not in self._missing]
        for row in field.run(present, self._measures, rounds(self._options)):
            if row["row"] == "chosen" and row["measure"] == "decode 1":
                self._fastest[row["contestant"]] = row["variant"]
            yield {"contest": contest.name, **row}
        field.close()

    def _same_model(self, present: Sequence[Contestant]) -> Iterator[dict[str, Any]]:
        """The other engines' logits against torch's, where torch takes part."""
        others = [c for c in present if c.engine not in (OURS, "torch")]
        reference = next(c for c in CONTESTS["float32"].contestants if c.engine == "torch")
        if others and "torch" in self._options.engines:
            yield from parts.same_model(others, self._open, reference, self._shape.vocab_size)

    def _ceiling(self) -> Iterator[dict[str, Any]]:
        """What prefill is held against, where torch is there to tell."""
        if "torch" not in self._options.engines or not set(CONTESTS) & set(self._options.only):
            return
        limits = {"threads": self._options.threads, "timeout_s": self._options.timeout_s}
        with Worker(python_of(self._options.peers or ""), "ceiling", {}, **limits) as worker:
            try:
                yield from parts.ceiling(worker, rounds(self._options))
            except EngineFailed as error:
                yield parts.failed("torch", "products of matrices", error)

    def _context(self) -> Iterator[dict[str, Any]]:
        """Our int8 at long contexts, where the shape reaches them."""
        contestant = _ours("int8")
        build = contestant.build
        reaches = self._shape.max_position_embeddings >= parts.CONTEXTS[-1]
        is_asked = "context" in self._options.only and OURS in self._options.engines
        if build is None or not is_asked or not reaches:
            return
        contestant = dataclasses.replace(contestant, file=f"{contestant.file}-context")
        try:
            self._compile(contestant, context_plan(build, self._shape))
            with self._open(contestant) as worker:
                yield from parts.context(worker, contestant.label, self._bandwidth.measure, rounds(self._options))
        except EngineFailed as error:
            yield parts.failed(contestant.label, "context", error)

    def _neighbour(self) -> Iterator[dict[str, Any]]:
        """Ours and llama.cpp, int8, with a busy core beside them."""
        if "neighbour" not in self._options.only:
            return
        contest = self._take_part(CONTESTS["int8"])
        yield from self._made(contest)
        chosen = [c for c in contest.contestants if c.engine in (OURS, "llama.cpp") and c.label not in self._missing]
        workers: dict[str, Worker] = {}
        try:
            for contestant in chosen:
                workers[contestant.label] = self._open(contestant)
                workers[contestant.label].wait_until_ready()
            yield from parts.neighbour(workers, rounds(self._options), self._steps[1])
        except EngineFailed as error:
            yield parts.failed("all", "neighbour", error)
        finally:
            for worker in workers.values():
                worker.close()

    def _convert(self) -> None:
        """The float32 folder by our interpreter, the other engines' files by theirs."""
        self._run_convert(sys.executable, ["hf"])
        names = [*self._chosen_contests(), *(["int8"] if "neighbour" in self._options.only else [])]
        wanted = [c for name in names for c in self._take_part(CONTESTS[name]).contestants]
        files = {c.file for c in wanted if c.engine != OURS}
        if files and self._options.peers is not None:
            self._run_convert(str(python_of(self._options.peers)), sorted(files))

    def _run_convert(self, python: str, files: Sequence[str]) -> None:
        command = [python, "-m", "benchmarks.peers.convert", self._shape.name, str(self._folder), *files]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
            raise UserError(f"the models of {self._shape.name} were not made in {self._folder}: {', '.join(files)}")

    def _compile(self, contestant: Contestant, flags_: Sequence[str]) -> None:
        rebuild = self._options.rebuild and contestant.file not in self._rebuilt
        target, timeout_s = self._folder / contestant.file, self._options.timeout_s
        compile_artifact(self._folder / "hf", target, flags_, rebuild=rebuild, timeout_s=timeout_s)
        self._rebuilt.add(contestant.file)

    def _start(self, contestant: Contestant, variant: Mapping[str, Any]) -> Worker:
        arguments = {"model": str(self._folder / contestant.file), **settings(contestant, variant, self._shape)}
        python = Path(sys.executable) if contestant.engine == OURS else python_of(self._options.peers or "")
        limits = {"threads": self._options.threads, "timeout_s": self._options.timeout_s}
        return Worker(python, contestant.engine, arguments, **limits)

    def _open(self, contestant: Contestant) -> Worker:
        """With the setting that was fastest at decoding in this run, else the first."""
        return self._start(contestant, self._fastest.get(contestant.label, contestant.variants[0]))

    @staticmethod
    def _in(contest: Contest, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            yield {"contest": contest.name, **row}


def _ours(contest: str) -> Contestant:
    return next(c for c in CONTESTS[contest].contestants if c.engine == OURS)


def _keep(options: Options, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    if options.jsonl is not None:
        with open(options.jsonl, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
