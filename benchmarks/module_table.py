"""The list of modules in docs/architecture.md: the first sentence of each module's docstring, by package.

    python -m benchmarks.module_table

rewrites the part of the page behind `## Modules`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
HEADING = "## Modules\n"
PACKAGES = {
    "passes": "graphs and what rewrites them",
    "passes/ops": "operations of ours",
    "passes/patterns": "what to look for, and rules that rewrite it",
    "passes/attention": "attention in any spelling",
    "passes/fusion": "what is computed together",
    "passes/sparse_attention": "fewer keys",
    "passes/quantization": "weights in fewer bits",
    "passes/incremental": "the derivation",
    "passes/incremental/rules": "what the derivation knows of operations",
    "sharding": "meshes and placement",
    "fastgpt_jax": "the package",
    "fastgpt_jax/compiler": "the composition root",
    "fastgpt_jax/artifact": "compiled programs on disk",
    "fastgpt_jax/kernels": "what runs in place of a meaning",
    "fastgpt_jax/kernels/attention": "attention",
    "fastgpt_jax/kernels/cpu": "native kernels for CPUs",
    "fastgpt_jax/sampling": "from logits to a token",
    "fastgpt_jax/engine": "requests and steps",
    "fastgpt_jax/serving": "the server",
    "fastgpt_jax/batch": "files of requests",
    "fastgpt_jax/bench": "load, and what came of it",
    "fastgpt_jax/models": "training forwards",
    "fastgpt_jax/models/layers": "what they share",
    "fastgpt_jax/checkpoint": "models on disk",
    "fastgpt_jax/checkpoint/gguf": "GGUF files",
    "fastgpt_jax/checkpoint/hub": "models by name",
    "fastgpt_jax/tokenizer": "text and ids",
    "fastgpt_jax/training": "small models from text",
    "fastgpt_jax/cli": "the commands",
}
"""Packages in the order of the page, with what they are about."""


def table() -> str:
    """The part of the page behind its heading."""
    parts = []
    for package, about in PACKAGES.items():
        rows = list(_rows(ROOT / package))
        if rows:
            parts.append(f"\n### {package}: {about}\n\n| module | what it does |\n|---|---|\n" + "".join(rows))
    return "".join(parts)


def missing_packages() -> list[str]:
    """Packages with modules that the page does not list."""
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for package in ("passes", "sharding", "fastgpt_jax")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    return sorted(found - PACKAGES.keys())


def _rows(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if path.name != "__init__.py" and docstring:
            yield f"| `{path.relative_to(ROOT).as_posix()}` | {_first_sentence(docstring)} |\n"


def _first_sentence(docstring: str) -> str:
    text = " ".join(docstring.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0]
    return sentence.replace("|", "\\|")


def main() -> None:
    """Rewrites the page."""
    head = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    PAGE.write_text(head + HEADING + table(), encoding="utf-8")


if __name__ == "__main__":
    main()
