"""Compares every family with its goldens from transformers and writes the table of docs/models.md.

    python -m benchmarks.parity_table            # all families, and the table is replaced
    python -m benchmarks.parity_table phi3 bloom # these alone, and no file is touched

Prints one line of JSON a family. A golden belongs to the family that its name begins with.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from benchmarks.derivation_table import ROOT, commit, replace_table
from tests.parity.goldens import GOLDENS, error_against, golden_config, load_golden

PAGE = ROOT / "docs" / "models.md"


@dataclasses.dataclass(frozen=True)
class About:
    """What the page says of a family: its name, the file of its forward, and what the goldens switch on."""

    title: str
    file: str
    features: str


ABOUT: Mapping[str, About] = MappingProxyType(
    {
        "llama": About("Llama", "llama.py", "grouped queries; RoPE plain, linear, llama3, yarn; biases; tied or not"),
        "llama3": About("Llama 3, 3.1, 3.2", "llama.py", "theta 500,000; llama3 scaling by 8 and 32; tied (3.2)"),
        "deepseek": About("DeepSeek-R1 distillations", "llama.py", "of Llama 3.1 and of Qwen2"),
        "qwen2": About("Qwen2, Qwen2.5", "llama.py", "biases on queries, keys and values"),
        "qwen3": About("Qwen3", "qwen3.py", "RMSNorm on heads of queries and keys; tied or not; biases"),
        "mistral": About("Mistral", "mistral.py", "sliding window, or none; head_dim given or not"),
        "phi3": About(
            "Phi-3, Phi-4-mini",
            "phi3.py",
            "fused projections; sliding window; longrope with short and with long factors; heads rotated in part",
        ),
        "gemma2": About(
            "Gemma 2", "gemma.py", "local and global layers; caps on scores and logits, or none; norms before and after"
        ),
        "gemma3": About(
            "Gemma 3 (text)", "gemma.py", "two thetas; linear scaling of global layers; norms on heads; cap on logits"
        ),
        "gpt2": About("GPT-2", "gpt2.py", "learned positions; fused projections; tied"),
        "bloom": About("Bloom", "bloom.py", "ALiBi for 4 heads and for 6; norm after the embedding"),
    }
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A family with the errors of its goldens, by their names."""

    family: str
    architectures: tuple[str, ...]
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def goldens_of(family: str) -> list[Path]:
    """The family's goldens, by the first word of their names."""
    return [path for path in GOLDENS if path.stem.partition("_")[0] == family]


def architectures_of(family: str) -> tuple[str, ...]:
    """The architectures that the family's goldens name."""
    return tuple(sorted({golden_config(path)["architectures"][0] for path in goldens_of(family)}))


def compare(family: str) -> Compared:
    """Loads every golden of a family as a user would, and runs the forward over its tokens in float32."""
    errors = {}
    for path in goldens_of(family):
        with tempfile.TemporaryDirectory() as folder:
            errors[path.stem] = error_against(path, load_golden(path, Path(folder)).model)
    return Compared(family, architectures_of(family), errors)


def versions() -> str:
    """What the goldens were made with."""
    return ", ".join(sorted({f"transformers {np.load(path)['transformers']}" for path in GOLDENS}))


def table(rows: Sequence[Compared], ours: str) -> Iterable[str]:
    """The lines between the markers; `ours` says what computed our side."""
    count = sum(len(row.errors) for row in rows)
    yield f"{count} goldens of {versions()}; ours computed by {ours}, in float32."
    yield ""
    yield "| family | architectures | forward | what the goldens switch on | goldens | worst relative error |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        about = ABOUT[row.family]
        yield (
            f"| {about.title} | {', '.join(row.architectures)} | `models/{about.file}` | {about.features} | "
            f"{len(row.errors)}: {', '.join(row.errors)} | {row.worst:.1e} |"
        )


def main(names: Sequence[str]) -> None:
    """Compares the families named, or all and writes the page."""
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
    rows = []
    for family in ABOUT:
        if not names or family in names:
            rows.append(compare(family))
            sys.stdout.write(json.dumps({**dataclasses.asdict(rows[-1]), "worst": rows[-1].worst, **about}) + "\n")
            sys.stdout.flush()
    if not names:
        ours = f"jax {jax.__version__} on {about['device']}"
        PAGE.write_text(replace_table(PAGE.read_text(), table(rows, ours)))


if __name__ == "__main__":
    main(sys.argv[1:])
