"""An artifact becomes a served model: verified, mapped, deserialized; nothing is traced, lowered or compiled.

Knows no compiler. The one idea: what is there is checked before it is used (bytes, then the environment, then the
numbers it computes), and only a difference of environment has a way out that serves the same tokens: compiling the
portable programs here.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from fastgpt_jax.artifact import fingerprint
from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey, Variant
from fastgpt_jax.artifact.environment import current_environment
from fastgpt_jax.artifact.executable import ArrayType, Placement, Signature, compile_portable, deserialize, init_zeros
from fastgpt_jax.artifact.lazy_steps import LazySteps
from fastgpt_jax.artifact.manifest import MANIFEST, EntryPointRecord, Manifest, read_manifest_digest
from fastgpt_jax.artifact.step import FlatStep, Step
from fastgpt_jax.artifact.transfers import MovesPages, make_transfers
from fastgpt_jax.artifact.verify import Level, verify_artifact
from fastgpt_jax.artifact.weights import map_weights
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from fastgpt_jax.tokenizer.loading import read_tokenizer_json
from fastgpt_jax.tokenizer.tokenizer import Tokenizer

OnMismatch = Literal["recompile", "refuse"]
ON_MISMATCH: tuple[OnMismatch, ...] = ("recompile", "refuse")
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"


def is_artifact(path: str | Path) -> bool:
    """Whether a folder claims to be an artifact; whether it is one, loading tells."""
    return (Path(path) / MANIFEST).is_file()


class ServedArtifact(MovesPages):
    """A loaded artifact, as an engine takes it.

    Invariants: the state given to `step` is donated and must not be used again; nothing is traced or compiled by
    `init_state`, `step` and what moves pages. A program is made callable when it is first asked for, and the steps not
    asked for yet in the background once the second step begins, so that a first token does not wait for programs it
    does not need.

    Attributes:
      manifest: What the artifact says of itself.
      chat_template: Source of the Jinja template that makes prompts of conversations; None where there is none.
      mismatches: In what this process differs from the one that compiled it; empty, or the programs were compiled here.
      seconds: Time that `verify`, `weights`, `executables`, `tokenizer` and `fingerprint` took.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: list[Any],
        load: Callable[[EntryPointRecord], Callable[..., Any]],
        init_state: Callable[[], list[Any]],
        transfers: Mapping[str, Callable[[], FlatStep]],
        tokenizer: Tokenizer | None,
        chat_template: str | None,
        mismatches: tuple[str, ...],
        seconds: dict[str, float],
    ):
        self.manifest, self.tokenizer, self.mismatches, self.seconds = manifest, tokenizer, mismatches, seconds
        self.chat_template = chat_template
        self._init_state = init_state
        self._has_run = False

        def load_step(record: EntryPointRecord) -> Step:
            return Step(record.key, load(record), [weights[i] for i in record.weights])

        self.steps = LazySteps({r.key: functools.partial(load_step, r) for r in manifest.entry_points})
        self.transfers = LazySteps(transfers)
        if mismatches:
            self.steps.load_all()
            self.transfers.load_all()

    @property
    def max_model_len(self) -> int:
        return self.manifest.model.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self.manifest.model.max_num_seqs

    @property
    def max_logprobs(self) -> int:
        return self.manifest.model.max_logprobs

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that it was compiled for."""
        return math.prod(size for _, size in self.manifest.mesh_axes)

    @property
    def vocab_size(self) -> int:
        return self.manifest.model.vocab_size

    @property
    def min_first_chunk(self) -> int:
        return self.manifest.model.min_first_chunk

    @property
    def hidden_size(self) -> int:
        return self.manifest.model.hidden_size

    @property
    def buckets(self) -> Buckets:
        return self.manifest.buckets

    @property
    def layout(self) -> CacheLayout:
        return self.manifest.layout

    @property
    def generation(self) -> GenerationDefaults:
        return self.manifest.model.generation

    def init_state(self) -> list[Any]:
        """Empty caches for `max_num_seqs` requests."""
        return self._init_state()

    def transfer(self, name: str) -> FlatStep:
        return self.transfers.get(name)

    def step(
        self,
        state: list[Any],
        inputs: StepInputs,
        sampler: SamplerInputs | None,
        *,
        variant: Variant,
        score: bool = False,
    ) -> tuple[StepOutputs, list[Any]]:
        """Runs one step; see `CompiledModel`."""
        key = EntryPointKey(len(inputs.tokens), len(inputs.num_new), variant, score)
        if self._has_run:
            self.steps.load_rest_in_background()
        self._has_run = True
        return self.steps.get(key)(state, inputs, sampler)


def load_artifact(
    path: str | Path,
    *,
    verify: Level = "auto",
    on_mismatch: OnMismatch = "recompile",
    check_fingerprint: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> ServedArtifact:
    """Loads an artifact.

    Args:
      verify: `full` reads every byte, `fast` all but those of the weights, `auto` is `full` up to 8 GB.
      on_mismatch: Whether an artifact of another environment is compiled again from its portable programs, or refused.
      check_fingerprint: Whether the model must reproduce the log-probabilities of a fixed prompt.
      tell: Receives a line for the user where something is noteworthy.

    Raises:
      CorruptArtifact: A file is not what was written.
      UserError: This is no artifact, its environment is another and that is to be refused, or its numbers are.
    """
    folder, clock = Path(path), _Clock()
    seen = read_manifest_digest(folder)
    manifest, level = verify_artifact(folder, verify)
    clock.lap("verify")
    if verify == "auto" and level == "fast":
        tell(f"{folder}: the weights are large, so their sizes alone were checked; --verify=full reads all of them")
    tokenizer, chat_template = _load_tokenizer(folder, manifest), _read_chat_template(folder)
    clock.lap("tokenizer")
    mismatches = manifest.environment.mismatches(current_environment())
    if mismatches and on_mismatch == "refuse":
        raise UserError(
            f"{folder} was compiled for another environment: {'; '.join(mismatches)}; compile it again here"
        )
    placement = _placement(manifest)
    clock.lap("backend")
    weights = map_weights(folder, manifest.weights, placement)
    clock.lap("weights")
    if mismatches:
        tell(
            f"{folder} was compiled for another environment: {'; '.join(mismatches)}. Compiling its "
            f"{len(manifest.entry_points)} portable programs here, which takes a while at every start; compile the "
            "model again to spare that"
        )
        init_state = init_zeros(manifest.state, placement)
        transfers = {
            name: functools.partial(_compile_transfer, manifest, placement, name) for name in manifest.transfers
        }
        load = functools.partial(_from_portable, folder, manifest, placement)
    else:
        # Read now, while the folder is what was verified; made callable when it is needed.
        code = {r.key: (folder / r.program.code).read_bytes() for r in manifest.entry_points}
        init_code = (folder / manifest.init_state.code).read_bytes()
        init_state = deserialize(init_code, _init_signature(manifest), placement)
        transfers = {
            name: functools.partial(_stored_transfer, (folder / r.code).read_bytes(), manifest, placement, name)
            for name, r in manifest.transfers.items()
        }
        load = functools.partial(_from_code, code, manifest, placement)
    if read_manifest_digest(folder) != seen:
        raise UserError(f"{folder} was replaced while it was loaded; load it again")
    artifact = ServedArtifact(
        manifest,
        weights,
        load,
        lambda: init_state([], [], [])[0],
        transfers,
        tokenizer,
        chat_template,
        mismatches,
        clock.seconds,
    )
    clock.lap("executables")
    if check_fingerprint:
        _check_fingerprint(artifact)
        clock.lap("fingerprint")
    return artifact


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _placement(manifest: Manifest) -> Placement:
    """The devices to run on: those of the mesh where there are as many, else one."""
    devices = jax.devices()
    needed = math.prod(size for _, size in manifest.mesh_axes)
    if not manifest.mesh_axes or needed > len(devices):
        return Placement((devices[0],))
    return Placement(tuple(devices[:needed]), manifest.mesh_axes)


def _from_code(
    code: dict[EntryPointKey, bytes], manifest: Manifest, placement: Placement, record: EntryPointRecord
) -> Callable[..., Any]:
    run = deserialize(code[record.key], _signature(manifest, record), placement)
    del code[record.key]
    return run


def _from_portable(
    folder: Path, manifest: Manifest, placement: Placement, record: EntryPointRecord
) -> Callable[..., Any]:
    program = (folder / record.portable).read_bytes()
    return compile_portable(program, _signature(manifest, record), placement)


def _stored_transfer(code: bytes, manifest: Manifest, placement: Placement, name: str) -> FlatStep:
    transfer = make_transfers(manifest.layout, manifest.state)[name]
    return deserialize(code, transfer.signature(manifest.transfers[name].kept), placement)


def _compile_transfer(manifest: Manifest, placement: Placement, name: str) -> FlatStep:
    return make_transfers(manifest.layout, manifest.state)[name].lower(placement.sharding).compile()


def _signature(manifest: Manifest, record: EntryPointRecord) -> Signature:
    weights = [manifest.weights[i] for i in record.weights]
    return Signature(
        name=record.key.name,
        state=manifest.state,
        weights=tuple(ArrayType(w.shape, w.dtype, w.spec) for w in weights),
        inputs=record.inputs,
        outputs=record.outputs,
        kept=record.program.kept,
    )


def _init_signature(manifest: Manifest) -> Signature:
    """The program that makes the state takes nothing; what it gives is the state and no outputs."""
    return Signature("init-state", (), (), (), manifest.state, ())


def _load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer | None:
    record = manifest.model.tokenizer
    if record is None:
        return None
    return Tokenizer(
        read_tokenizer_json(folder / "tokenizer/tokenizer.json"),
        bos_token_id=record.bos_token_id,
        eos_token_ids=record.eos_token_ids,
        add_bos=record.add_bos,
    )


def _read_chat_template(folder: Path) -> str | None:
    """The template's source as it stands: what reads it is not needed before a chat."""
    path = folder / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _check_fingerprint(artifact: ServedArtifact) -> None:
    expected = artifact.manifest.fingerprint

    def run(key: EntryPointKey, state: list[Any], inputs: StepInputs) -> Any:
        return artifact.steps.get(key)(state, inputs, None)

    try:
        found, _ = fingerprint.measure(
            expected.prompt_ids, artifact.buckets, artifact.layout, artifact.max_model_len, run, artifact.init_state()
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the programs of the artifact fail here: {error}; compile the model again") from error
    fingerprint.check(expected, found)
