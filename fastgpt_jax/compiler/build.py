"""Writes a model's artifact: every entry point compiled, the weights they share, and the manifest.

Knows no command line. The one idea: an entry point's machine code is kept under a digest of the program and of all that
code depends on, so that what an interrupted or earlier build has finished is found and not compiled again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fastgpt_jax.artifact import fingerprint
from fastgpt_jax.artifact.codec import decode, encode
from fastgpt_jax.artifact.digests import digest_bytes, digest_file
from fastgpt_jax.artifact.environment import Environment, current_environment
from fastgpt_jax.artifact.executable import (
    Placement,
    Signature,
    compile_afresh,
    compiler_options,
    deserialize,
    export_portable,
    kept_arguments,
    serialize,
)
from fastgpt_jax.artifact.manifest import (
    FORMAT,
    CertificateRecord,
    EntryPointRecord,
    FileRecord,
    Manifest,
    ModelRecord,
    OutputChange,
    PassRecord,
    ProgramRecord,
    QualityRecord,
    TokenizerRecord,
    WorkRecord,
    read_manifest,
    write_manifest,
)
from fastgpt_jax.artifact.staging import Staging
from fastgpt_jax.artifact.step import Step
from fastgpt_jax.artifact.transfers import make_transfers
from fastgpt_jax.artifact.weights import Weight, write_weights
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compiled_cost import compiled_cost
from fastgpt_jax.compiler.distribution import array_type, spec_of_array
from fastgpt_jax.compiler.entry_point import TracedEntryPoint
from fastgpt_jax.compiler.memory_plan import check_built, peak_bytes
from fastgpt_jax.errors import UserError
from fastgpt_jax.kernels.cpu.library import TARGET_PREFIX
from fastgpt_jax.tokenizer.tokenizer import Tokenizer
from passes.manager import PassStatistics

PLATFORMS = ("cpu", "cuda", "tpu")
"""What portable programs are made for."""
_PROGRESS = "progress"
_MAX_REMARKS = 20


@dataclasses.dataclass(frozen=True)
class Event:
    """A step of a build, for whoever shows it.

    Attributes:
      kind: An entry point is compiled (or was found), a weight is written.
      done: Entry points, or bytes, so far.
      total: Of all.
      seconds: Time that compiling took.
      is_reused: An earlier build had compiled it.
    """

    kind: Literal["entry_point", "weights"]
    name: str
    done: int
    total: int
    seconds: float = 0.0
    is_reused: bool = False


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What was written.

    Attributes:
      reused: Names of programs whose code an earlier build had made.
      seconds: The whole build.
    """

    output: Path
    manifest: Manifest
    reused: frozenset[str]
    seconds: float


def build_artifact(
    compiled: Compiled,
    output: Path,
    *,
    name: str,
    notes: Mapping[str, str] | None = None,
    chat_template: str | None = None,
    changes: Sequence[OutputChange] = (),
    quality: Sequence[QualityRecord] = (),
    report: Callable[[Event], None] = lambda event: None,
) -> BuildReport:
    """Compiles every entry point of a model and writes its artifact, whole or not at all.

    An artifact that is there already is replaced when the new one is complete.

    Args:
      name: What the model is called.
      notes: Choices that were fixed with the model, for the manifest.
      changes: By each pass of the pipeline, for the manifest.
      quality: Of the model as it is served, for the manifest.

    Raises:
      UserError: The output cannot be used, or the model cannot be stored.
      OSError: The disk is full or not writable; what is finished is kept for the next build.
    """
    start = time.perf_counter()
    tokenizer = _storable_tokenizer(compiled.tokenizer)
    with Staging(output) as staging:
        builder = _Builder(compiled, staging, report, changes)
        entries, init_state = builder.programs()
        check_built(compiled, entries, builder.weight_names)
        weights, files = builder.weights()
        _write_tokenizer(staging.path, compiled.tokenizer, chat_template)
        manifest = Manifest(
            format=FORMAT,
            producer=importlib.metadata.version("fastgpt-jax"),
            environment=_needed(builder.environment, entries),
            model=ModelRecord(
                name=name,
                digest=digest_bytes("".join(digest for file in files for digest in file.sha256).encode()),
                vocab_size=compiled.vocab_size,
                hidden_size=compiled.hidden_size,
                max_model_len=compiled.max_model_len,
                max_num_seqs=compiled.max_num_seqs,
                max_logprobs=compiled.max_logprobs,
                min_first_chunk=compiled.min_first_chunk,
                generation=compiled.generation,
                tokenizer=tokenizer,
                notes={**(notes or {}), **compiled.notes},
            ),
            mesh_axes=compiled.distribution.mesh_axes,
            layout=compiled.layout,
            buckets=compiled.buckets,
            state=builder.state,
            init_state=init_state,
            transfers=builder.transfers(),
            weights=tuple(weights),
            entry_points=tuple(entries),
            certificate=_certificate(compiled),
            quality=tuple(quality),
            fingerprint=builder.fingerprint(entries),
            files=(),
        )
        shutil.rmtree(staging.path / _PROGRESS, ignore_errors=True)
        manifest = dataclasses.replace(manifest, files=_finish_files(staging.path, manifest, files))
        write_manifest(staging.path, manifest)
        staging.publish()
    return BuildReport(output, manifest, frozenset(builder.reused), time.perf_counter() - start)


class _Builder:
    """The programs and weights of one build."""

    def __init__(
        self,
        compiled: Compiled,
        staging: Staging,
        report: Callable[[Event], None],
        changes: Sequence[OutputChange],
    ):
        self._compiled, self._staging, self._report, self._changes = compiled, staging, report, changes
        self.environment: Environment = current_environment(compiled.distribution.num_devices)
        self.state = tuple(map(array_type, compiled.distribution.state_shapes(compiled.program)))
        self.reused: set[str] = set()
        self._names: dict[str, int] = {}
        self._earlier = _earlier_programs(staging)
        for folder in ("executables", "portable", _PROGRESS):
            (staging.path / folder).mkdir(exist_ok=True)

    def programs(self) -> tuple[list[EntryPointRecord], ProgramRecord]:
        """Compiles all entry points, and the program that makes the state."""
        keys = list(dict.fromkeys(self._compiled.buckets.keys()))
        entries = []
        for index, key in enumerate(keys):
            traced = self._compiled.trace(key)
            entries.append(self._entry_point(traced))
            program = entries[-1].program
            self._report(Event("entry_point", key.name, index + 1, len(keys), program.seconds, key.name in self.reused))
        distribution, program = self._compiled.distribution, self._compiled.program
        shardings = [x.sharding for x in distribution.state_shapes(program)]
        init = jax.jit(lambda: (jax.tree.leaves(program.init_state()), []), out_shardings=(shardings, []))
        digest = self._digest(json.dumps(encode(self.state)).encode())
        return entries, self._program("init-state", digest, lambda: compile_afresh(init.lower()))

    @property
    def weight_names(self) -> list[str]:
        """Of the weights that the programs read, in the order of the manifest's table."""
        return list(self._names)

    def transfers(self) -> dict[str, ProgramRecord]:
        """Compiles the programs that move pages and carried values."""
        records = {}
        for name, transfer in make_transfers(self._compiled.layout, self.state).items():
            lowered = transfer.lower(self._compiled.distribution.sharding)
            digest = self._digest(lowered.as_text().encode())
            records[name] = self._program(name, digest, lambda lowered=lowered: compile_afresh(lowered))
        return records

    def weights(self) -> tuple[list[Any], list[FileRecord]]:
        """Writes every weight that an entry point reads."""
        store = self._compiled.store
        weights = [_weight(store, name) for name in self._names]
        total, done = sum(weight.nbytes for weight in weights), 0

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self._report(Event("weights", "weights", done, total))

        return write_weights(self._staging.path, weights, progress)

    def fingerprint(self, entries: Sequence[EntryPointRecord]) -> fingerprint.Fingerprint:
        """Numbers of the model as it is served: from the code as it is stored, loaded anew."""
        compiled, by_key = self._compiled, {entry.key: entry for entry in entries}
        prompt = fingerprint.make_prompt(compiled.vocab_size, compiled.buckets, compiled.min_first_chunk)

        def run(key: Any, state: list[Any], inputs: Any) -> Any:
            return self._stored_step(by_key[key])(state, inputs, None)

        found, _ = fingerprint.measure(
            prompt, compiled.buckets, compiled.layout, compiled.max_model_len, run, compiled.init_state()
        )
        return found

    def _stored_step(self, entry: EntryPointRecord) -> Step:
        names = list(self._names)
        weights = [self._compiled.store[names[i]] for i in entry.weights]
        signature = Signature(
            name=entry.key.name,
            state=self.state,
            weights=tuple(map(array_type, weights)),
            inputs=entry.inputs,
            outputs=entry.outputs,
            kept=entry.program.kept,
        )
        code = (self._staging.path / entry.program.code).read_bytes()
        placement = self._compiled.distribution.placement or Placement((jax.devices()[0],))
        return Step(entry.key, deserialize(code, signature, placement), weights)

    def _entry_point(self, traced: TracedEntryPoint) -> EntryPointRecord:
        name = traced.key.name
        unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.arguments)
        portable = export_portable(traced.portable, unplaced, PLATFORMS)
        (self._staging.path / f"portable/{name}.bin").write_bytes(portable)

        def compile_step() -> jax.stages.Compiled:
            found = compile_afresh(traced.jitted.lower(*traced.arguments))
            store = self._compiled.store
            # Whoever goes on with the model in this process need not compile it again.
            self._compiled.steps[traced.key] = Step(traced.key, found, [store[n] for n in traced.weights])
            return found

        placed = [array_type(x) for group in traced.arguments for x in group]
        # Constraints on placement are not in the portable program.
        constraints = traced.jitted.lower(*traced.arguments).as_text() if self._compiled.distribution.mesh_axes else ""
        digest = self._digest(portable + json.dumps([encode(placed), constraints, traced.native]).encode())
        program = self._program(name, digest, compile_step)
        outputs = jax.eval_shape(traced.jitted, *traced.arguments)[0]
        return EntryPointRecord(
            key=traced.key,
            program=program,
            portable=f"portable/{name}.bin",
            weights=tuple(self._names.setdefault(n, len(self._names)) for n in traced.weights),
            inputs=tuple(map(array_type, traced.arguments[2])),
            outputs=tuple(map(array_type, outputs)),
            flops=traced.cost.flops,
            nbytes=traced.cost.bytes,
            passes=tuple(map(_pass_record, traced.passes, [*self._changes, *[None] * len(traced.passes)])),
        )

    def _program(self, name: str, digest: str, make: Callable[[], jax.stages.Compiled]) -> ProgramRecord:
        """Machine code from an earlier build where that has it, else newly compiled; both end in the staging folder."""
        path = f"executables/{name}.bin"
        earlier = self._earlier.get(digest)
        if earlier is not None:
            record, code = earlier
            self.reused.add(name)
            record = dataclasses.replace(record, code=path)
        else:
            start = time.perf_counter()
            compiled = make()
            seconds = time.perf_counter() - start
            code = serialize(compiled)
            record = ProgramRecord(
                path, digest, kept_arguments(compiled), peak_bytes(compiled), seconds, _work(compiled)
            )
        (self._staging.path / path).write_bytes(code)
        note = {"record": encode(record), "sha256": digest_bytes(code)}
        (self._staging.path / _PROGRESS / f"{name}.json").write_text(json.dumps(note), encoding="utf-8")
        return record

    def _digest(self, program: bytes) -> str:
        return digest_bytes(
            program
            + json.dumps(encode([self.environment, self._compiled.distribution.mesh_axes, compiler_options()])).encode()
        )


def _earlier_programs(staging: Staging) -> dict[str, tuple[ProgramRecord, bytes]]:
    """Undamaged programs of an interrupted build and of the artifact that is to be replaced, by digest."""
    found: dict[str, tuple[ProgramRecord, bytes]] = {}
    for path in sorted((staging.path / _PROGRESS).glob("*.json")):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            record = decode(ProgramRecord, note["record"])
            code = (staging.path / record.code).read_bytes()
            is_whole = digest_bytes(code) == note["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_whole:
            found[record.digest] = (record, code)
    try:
        manifest = read_manifest(staging.output)
    except (UserError, OSError):
        return found
    digests = {file.path: file.sha256 for file in manifest.files}
    for record in manifest.programs:
        path = staging.output / record.code
        if path.is_file() and digest_file(path) == digests.get(record.code):
            found.setdefault(record.digest, (record, path.read_bytes()))
    return found


def _finish_files(folder: Path, manifest: Manifest, weights: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    """A record for every file that belongs to the artifact; what an interrupted build left besides is removed."""
    wanted = {*(program.code for program in manifest.programs), *(file.path for file in weights)}
    wanted |= {entry.portable for entry in manifest.entry_points}
    wanted |= {path.relative_to(folder).as_posix() for path in (folder / "tokenizer").glob("*")}
    known, records = {file.path: file for file in weights}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in wanted:
            path.unlink()
        else:
            records.append(known.get(name) or FileRecord(name, path.stat().st_size, digest_file(path)))
    return tuple(records)


def _storable_tokenizer(tokenizer: Any) -> TokenizerRecord | None:
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(
            f"a {type(tokenizer).__name__} cannot be stored as the model's tokenizer; give the folder of one, with "
            "tokenizer.json, or leave it out and serve token ids"
        )
    return TokenizerRecord(tokenizer.bos_token_id, tuple(tokenizer.eos_token_ids), tokenizer.add_bos)


def _write_tokenizer(folder: Path, tokenizer: Any, chat_template: str | None) -> None:
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    if tokenizer is None:
        return
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer/tokenizer.json")
    if chat_template is not None:
        (folder / "tokenizer/chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _weight(store: Any, name: str) -> Weight:
    array = store[name]
    return Weight(name, tuple(array.shape), str(array.dtype), spec_of_array(array), lambda: np.asarray(array))


def _needed(environment: Environment, entries: Sequence[EntryPointRecord]) -> Environment:
    """The environment as far as programs need it: native kernels only where one calls them."""
    is_native = any(name.startswith(TARGET_PREFIX) for entry in entries for name in entry.program.work.libraries)
    return environment if is_native else dataclasses.replace(environment, cpu_kernels="")


def _work(compiled: jax.stages.Compiled) -> WorkRecord:
    cost = compiled_cost(compiled)
    return WorkRecord(
        cost.dot_flops,
        cost.elementwise_flops,
        cost.bytes_read,
        cost.bytes_written,
        dict(cost.collectives),
        dict(cost.libraries),
        cost.unknown_loops,
    )


def _pass_record(statistics: PassStatistics, change: OutputChange | None) -> PassRecord:
    before, after = statistics.cost_before, statistics.cost_after
    return PassRecord(
        name=statistics.name,
        detail=statistics.detail,
        numerics=statistics.numerics.value,
        matched=statistics.result.matched,
        missed=statistics.result.missed,
        seconds=statistics.seconds,
        ops=(statistics.ops_before, statistics.ops_after),
        flops=(before.flops, after.flops),
        nbytes=(before.bytes, after.bytes),
        remarks=tuple(map(str, statistics.result.remarks[:_MAX_REMARKS])),
        notes=tuple(dict.fromkeys(map(str, statistics.result.notes)))[:_MAX_REMARKS],
        change=change,
    )


def _certificate(compiled: Compiled) -> CertificateRecord:
    c = compiled.certificate
    return CertificateRecord(tuple(c.lengths), float(c.worst_error), c.decode_flops, c.forward_flops, c.expansion_flops)
