"""What an artifact's `manifest.json` says, as dataclasses: the format, written down once.

DIR/manifest.json, manifest.sha256       this, and its digest
DIR/weights/*.safetensors                every tensor at a multiple of 64 bytes
DIR/executables/*.bin                    machine code, one file an entry point
DIR/portable/*.bin                       the same programs as StableHLO, for other machines
DIR/tokenizer/tokenizer.json             where the model has a tokenizer, and chat_template.jinja
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.codec import SchemaError, decode, encode
from fastgpt_jax.artifact.digests import digest_bytes
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey
from fastgpt_jax.artifact.environment import Environment
from fastgpt_jax.artifact.executable import ArrayType, Spec
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults

FORMAT = 3
MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"


class CorruptArtifact(UserError):
    """A file of an artifact is not what was written, or is none of its files."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file: its path in the folder, with `/`; digests of each 64 MiB."""

    path: str
    nbytes: int
    sha256: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WeightRecord:
    """A weight: its bytes begin at `begin` of `file`, row-major; `spec` as in `ArrayType`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    file: str
    begin: int


@dataclasses.dataclass(frozen=True)
class OutputChange:
    """By how much a pass changes the model's logits on a fixed input.

    Attributes:
      absolute: The largest difference.
      relative: The same in parts of the largest logit.
    """

    absolute: float
    relative: float


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What a pass did to an entry point.

    Attributes:
      detail: The pass's settings, such as a quantization scheme; empty where it has none.
      remarks: What nearly matched, and why it did not.
      notes: What was decided, and why: which kernel runs an operation, and why each other one does not.
      change: Of the whole model by this pass, where that was asked for.
    """

    name: str
    detail: str
    numerics: str
    matched: int
    missed: int
    seconds: float
    ops: tuple[int, int]
    flops: tuple[int, int]
    nbytes: tuple[int, int]
    remarks: tuple[str, ...]
    notes: tuple[str, ...]
    change: OutputChange | None


@dataclasses.dataclass(frozen=True)
class WorkRecord:
    """What a run of a program computes and moves, counted in its compiled module; of one device.

    Attributes:
      dot_flops: Of products.
      elementwise_flops: Of all else.
      collectives: Kind -> bytes that a device gives or gets.
      libraries: What a library runs -> how often.
      unknown_loops: Loops whose trips are not known; their bodies are counted once.
    """

    dot_flops: int
    elementwise_flops: int
    bytes_read: int
    bytes_written: int
    collectives: Mapping[str, int]
    libraries: Mapping[str, int]
    unknown_loops: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Of products and all else."""
        return self.dot_flops + self.elementwise_flops

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


@dataclasses.dataclass(frozen=True)
class ProgramRecord:
    """A compiled program.

    Attributes:
      code: Path of its machine code.
      digest: Of the program and of all that its machine code depends on: equal digests may share the code.
      kept: Positions of the flat arguments that the code takes.
      peak_bytes: Memory of the device while it runs, arguments and results included.
      seconds: Time that compiling took.
      work: What a run of it computes and moves.
    """

    code: str
    digest: str
    kept: tuple[int, ...]
    peak_bytes: int
    seconds: float
    work: WorkRecord


@dataclasses.dataclass(frozen=True)
class EntryPointRecord:
    """An entry point.

    Attributes:
      portable: Path of its StableHLO.
      weights: Positions in the manifest's table of the weights it reads, in order.
      flops: Of one step as a graph, before XLA.
      nbytes: Bytes read and written by one step as a graph, each operation by itself.
    """

    key: EntryPointKey
    program: ProgramRecord
    portable: str
    weights: tuple[int, ...]
    inputs: tuple[ArrayType, ...]
    outputs: tuple[ArrayType, ...]
    flops: int
    nbytes: int
    passes: tuple[PassRecord, ...]


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What `tokenizer/tokenizer.json` does not say.

    Attributes:
      add_bos: Whether a text begins with the BOS token even where the file does not put it there.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """The model as the engine knows it.

    Attributes:
      digest: Of all its weights.
      hidden_size: Numbers of a row of `StepOutputs.hidden`; 0 where there are none.
      notes: Choices that were fixed when it was compiled, such as which factors of a rope scaling.
    """

    name: str
    digest: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    min_first_chunk: int
    generation: GenerationDefaults
    tokenizer: TokenizerRecord | None
    notes: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class CertificateRecord:
    """What was compared when the step was derived; see the compiler's `Certificate`."""

    lengths: tuple[int, ...]
    worst_error: float
    decode_flops: int
    forward_flops: int
    expansion_flops: int


@dataclasses.dataclass(frozen=True)
class QualityRecord:
    """How far the model is from the one that was given, on some text, once something has rounded it.

    Attributes:
      after: The pass, or the dtype of caches; what came before it is in it.
      text: Name of the file.
      mean_kld, kld_999: Divergence of next-token distributions in nats, and that which one in a thousand exceeds.
      same_top1: Share of positions with the same likeliest token.
    """

    after: str
    text: str
    num_tokens: int
    mean_kld: float
    kld_999: float
    same_top1: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Numbers that the artifact must reproduce: the most likely tokens after a fixed prompt.

    Attributes:
      tolerance: Largest difference of a log-probability that is taken for rounding.
    """

    prompt_ids: tuple[int, ...]
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All of it.

    Attributes:
      producer: Version of this package that wrote it.
      mesh_axes: Name and size of each mesh axis; empty for one device.
      state: Arrays that live between steps, in the order of the calling convention.
      init_state: The program that makes them.
      transfers: Those that move parts of them, by name.
    """

    format: int
    producer: str
    environment: Environment
    model: ModelRecord
    mesh_axes: tuple[tuple[str, int], ...]
    layout: CacheLayout
    buckets: Buckets
    state: tuple[ArrayType, ...]
    init_state: ProgramRecord
    transfers: Mapping[str, ProgramRecord]
    weights: tuple[WeightRecord, ...]
    entry_points: tuple[EntryPointRecord, ...]
    certificate: CertificateRecord
    quality: tuple[QualityRecord, ...]
    fingerprint: Fingerprint
    files: tuple[FileRecord, ...]

    @property
    def programs(self) -> list[ProgramRecord]:
        """All compiled programs."""
        return [self.init_state, *self.transfers.values(), *(entry.program for entry in self.entry_points)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` and its digest."""
    data = (json.dumps(encode(manifest), indent=1) + "\n").encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_text(f"{digest_bytes(data)}  {MANIFEST}\n", encoding="ascii")


def read_manifest_digest(folder: Path) -> bytes:
    """What `manifest.sha256` holds, which tells one artifact from another; nothing where it cannot be read."""
    try:
        return (folder / MANIFEST_DIGEST).read_bytes()
    except OSError:
        return b""


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest once its digest holds.

    Raises:
      CorruptArtifact: It is not what was written.
      UserError: There is none, or it is of another format.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no {MANIFEST}: it is no artifact, or one that was never finished")
    data = (folder / MANIFEST).read_bytes()
    try:
        written = (folder / MANIFEST_DIGEST).read_bytes()
    except OSError:
        raise CorruptArtifact(f"{folder / MANIFEST_DIGEST} is missing; {_WAY_OUT}") from None
    if written != f"{digest_bytes(data)}  {MANIFEST}\n".encode():
        raise CorruptArtifact(
            f"{folder / MANIFEST} is corrupt, or {MANIFEST_DIGEST} is: one is not the other's digest; {_WAY_OUT}"
        )
    try:
        values = json.loads(data)
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is no JSON: {error}; compile the model again") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder} is of format {found} and this version reads {FORMAT}; compile the model again")
    try:
        return decode(Manifest, values)
    except SchemaError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}; compile the model again") from error


_WAY_OUT = "copy the artifact again, or compile the model again"
