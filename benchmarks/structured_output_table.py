"""Runs JSON-Schema-Test-Suite through structured output and writes the counts into docs/structured_output.md.

    python -m benchmarks.structured_output_table SUITE.tar.gz            # replaces the table
    python -m benchmarks.structured_output_table SUITE.tar.gz --print    # tells each test that is not as the suite says
    python -m benchmarks.structured_output_table --cost FOLDER ...       # what a token costs, with these tokenizers

Each schema is compiled as a request's would be, over a vocabulary of single bytes, with the draft of its folder as
`$schema` where it names none. An instance counts as accepted when one of its spellings in compact JSON is: its keys in
some order, its whole numbers with or without `.0`. So a valid instance needs one spelling accepted, and an invalid one
all refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.derivation_table import commit, replace_table
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured import StructuredCompiler, StructuredOutput
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from fastgpt_jax.tokenizer import load_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "structured_output.md"
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}
MAX_SPELLINGS = 720
EOS = 256


class ByteTokenizer:
    """A token for each byte, and an end of text."""

    eos_token_ids = (EOS,)
    special_token_ids = frozenset((EOS,))

    def describe(self) -> str:
        return json.dumps({"decoder": {"type": "ByteFallback"}})

    def token(self, token_id: int) -> str | None:
        return f"<0x{token_id:02X}>" if token_id < EOS else "</s>" if token_id == EOS else None


def make_compiler() -> StructuredCompiler:
    return StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), max_cached=1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one test of the suite, or, where `kind` is "refused", of one schema with all its tests."""

    draft: str
    keyword: str
    kind: str  # refused, accepted, rejected, wrongly accepted, wrongly rejected
    schema: Any
    instance: Any = None
    message: str = ""


def read_suite(archive: Path, drafts: Sequence[str] = tuple(DRAFTS)) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yields draft, keyword (with the folders of optional tests before it) and cases of every file."""
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            parts = PurePosixPath(member.name.removeprefix("./")).parts
            if len(parts) < 3 or parts[0] != "tests" or parts[1] not in drafts or not member.isfile():
                continue
            data = files.extractfile(member)
            if data is not None:
                yield parts[1], "/".join(parts[2:]).removesuffix(".json"), json.load(data)


def judge(compiler: StructuredCompiler, draft: str, keyword: str, case: dict[str, Any]) -> Iterator[Outcome]:
    """Yields the outcome of every test of a schema, or one that says it was refused."""
    schema = case["schema"]
    if isinstance(schema, dict) and "$schema" not in schema:
        schema = {"$schema": DRAFTS[draft], **schema}
    params = StructuredOutputsParams(json=schema)
    try:
        compiler.compile(params)
    except UserError as error:
        yield Outcome(draft, keyword, "refused", schema, message=str(error))
        return
    for test in case["tests"]:
        # In draft 4, 1.0 is no integer, so that it has one spelling.
        texts = spellings(test["data"], both_numbers=draft != "draft4")
        accepted = any(is_accepted(compiler, params, text) for text in texts)
        kind = ("" if accepted == test["valid"] else "wrongly ") + ("accepted" if accepted else "rejected")
        yield Outcome(draft, keyword, kind, schema, test["data"])


def is_accepted(compiler: StructuredCompiler, params: StructuredOutputsParams, text: bytes) -> bool:
    """Whether a whole text can be generated: every byte allowed, and then the end."""
    state = StructuredOutput(params, compiler)
    for token_id in (*text, EOS):
        if state.is_terminated:
            return token_id == EOS and state.failure is None
        if not state.bitmask()[token_id // 32] >> (token_id % 32) & 1:
            return False
        state.accept(token_id)
    return state.is_terminated and state.failure is None


def spellings(instance: Any, *, both_numbers: bool = True) -> list[bytes]:
    """The texts that an instance may be written as, `MAX_SPELLINGS` at most of either spelling of numbers."""
    texts: dict[str, None] = {}
    for is_short in (True, False) if both_numbers else (False,):
        texts.update(dict.fromkeys(itertools.islice(_spell(instance, is_short), MAX_SPELLINGS)))
    return [text.encode() for text in texts]


def _spell(instance: Any, is_short: bool) -> Iterator[str]:
    if isinstance(instance, dict):
        for order in itertools.permutations(instance.items()):
            values = [[f"{_quote(key)}:{text}" for text in _spell(value, is_short)] for key, value in order]
            yield from ("{" + ",".join(chosen) + "}" for chosen in itertools.product(*values))
    elif isinstance(instance, list):
        values = [list(_spell(value, is_short)) for value in instance]
        yield from ("[" + ",".join(chosen) + "]" for chosen in itertools.product(*values))
    elif isinstance(instance, float) and instance.is_integer() and is_short:
        yield str(int(instance))
    else:
        yield _quote(instance)


def _quote(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def run(archive: Path, drafts: Sequence[str] = tuple(DRAFTS)) -> list[Outcome]:
    """Runs the whole suite."""
    compiler = make_compiler()
    return [
        outcome
        for draft, keyword, cases in read_suite(archive, drafts)
        for case in cases
        for outcome in judge(compiler, draft, keyword, case)
    ]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Counts by keyword, all drafts together; what is refused counts schemas, all else instances."""
    kinds = ("accepted", "rejected", "refused", "wrongly rejected", "wrongly accepted")
    lines = [
        "| file | valid, accepted | invalid, rejected | schemas refused | valid, rejected | invalid, accepted |",
        "|---|---|---|---|---|---|",
    ]
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.keyword, Counter())[outcome.kind] += 1
    total = sum(counts.values(), Counter())
    for keyword, row in [*sorted(counts.items(), key=lambda item: ("/" in item[0], item[0])), ("all", total)]:
        lines.append(f"| {keyword} | " + " | ".join(str(row[kind]) for kind in kinds) + " |")
    return lines


FORMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "schema": {
            "json": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0},
                    "born": {"type": "string", "format": "date"},
                    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
                },
                "required": ["name", "age", "born", "tags"],
                "additionalProperties": False,
            }
        },
        "any object": {"json_object": True},
        "regex": {"regex": r"[A-Z][a-z]{2,20}( [A-Za-z]{1,20}){0,30}\."},
        "100 choices": {"choice": [f"answer number {index}" for index in range(100)]},
    }
)


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Times what a form costs with one tokenizer, along random texts; yields a row a form.

    A token is taken, and the mask of the next one made.
    """
    tokenizer: Any = load_tokenizer(folder)
    compiler = StructuredCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    vocabulary_s = _timed(compiler.prepare)[1]
    rng = np.random.default_rng(0)
    for form, arguments in FORMS.items():
        params = StructuredOutputsParams(**arguments)
        compile_s = _timed(lambda params=params: compiler.compile(params))[1]
        copies, tokens = [], []
        while len(tokens) < 2000:
            state, seconds = _timed(lambda params=params: StructuredOutput(params, compiler))
            copies.append(seconds)
            for _ in range(200):
                allowed = np.flatnonzero(np.unpackbits(state.bitmask().view(np.uint8), bitorder="little"))
                token_id = int(rng.choice(allowed))
                tokens.append(_timed(lambda s=state, t=token_id: s.accept(t))[1])
                if state.is_terminated:
                    break
        yield {
            "tokenizer": folder.name,
            "vocab_size": tokenizer.vocab_size,
            "form": form,
            "vocabulary_s": round(vocabulary_s, 2),
            "compile_ms": round(1e3 * compile_s, 2),
            "copy_us": round(1e6 * float(np.median(copies))),
            "token_us": round(1e6 * float(np.median(tokens)), 1),
            "token_p99_us": round(1e6 * float(np.quantile(tokens, 0.99))),
        }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main(argv: Sequence[str]) -> None:
    if argv[0] == "--cost":
        about = {"llguidance": version("llguidance"), "machine": platform.processor() or platform.machine()}
        for folder in argv[1:]:
            for row in measure(Path(folder)):
                print(json.dumps({**row, **about, "commit": commit()}), flush=True)
        return
    outcomes = run(Path(argv[0]))
    if "--print" in argv:
        for outcome in outcomes:
            if outcome.kind.startswith("wrongly") or outcome.kind == "refused":
                print(json.dumps(dataclasses.asdict(outcome), ensure_ascii=False))
        return
    PAGE.write_text(replace_table(PAGE.read_text(), table(outcomes)))


if __name__ == "__main__":
    main(sys.argv[1:])
