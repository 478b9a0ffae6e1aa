"""A run as Markdown: the tables of docs/cpu.md, and what is printed.

The one idea: whatever was tried, chosen, left out or refused stands beside the figures, since a comparison is worth
what its settings are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.peers import summary
from benchmarks.peers.contests import OURS
from benchmarks.peers.protocol import ROOT
from benchmarks.peers.summary import Row
from fastgpt_jax.cli.tables import format_bytes
from fastgpt_jax.errors import UserError

PAGE = ROOT / "docs" / "cpu.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def report(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a run."""
    yield from _run(next(row for row in rows if row["row"] == "run"))
    for shape in summary.shapes_of(rows):
        own = summary.of_shape(rows, shape)
        yield from ["", f"### {shape}"]
        for part in (_speed, _startup, _exactness, _context, _neighbour, _verdicts, _settings, _failures):
            lines = list(part(own))
            if lines:
                yield ""
                yield from lines


def write_page(lines: Sequence[str], page: Path = PAGE, begin: str = BEGIN, end: str = END) -> None:
    """Puts the lines between the page's markers."""
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{page} needs the lines {begin} and {end}")
    page.write_text("\n".join([f"{head}{begin}", "", *lines, "", f"{end}{tail}"]), encoding="utf-8")


def _run(row: Row) -> Iterator[str]:
    yield (
        f"{row['cpu']} (family/model {row['family_model']}, {' '.join(row['features'])}), {row['cores']} cores, "
        f"{row['threads']} threads for every engine; pages of {format_bytes(row['page_size'])}, transparent huge pages "
        f"`{row['huge_pages']}`; Linux {row['kernel']}, Python {row['python']}, load {row['load']:.1f} at the start; "
        f"commit {row['commit']}; medians of {row['rounds']} rounds{', a quick run' if row['is_quick'] else ''}."
    )


def _speed(rows: Sequence[Row]) -> Iterator[str]:
    """Tokens a second; under the decodes the share of the bandwidth."""
    measures = [m for m in summary.measures_of(rows) if not m.startswith("bare")]
    if not measures:
        return
    yield (
        "Tokens a second; in brackets, of a decode the share of what the memory bandwidth beside it allows, of a "
        "prefill the share of what the run's fastest products of matrices allow."
    )
    found = {numbers: summary.ceiling(rows, numbers) for numbers in ("int8", "bfloat16", "float32")}
    told = [f"{numbers} {rate / 1e9:.0f}" for numbers, rate in found.items() if rate is not None]
    if told:
        yield f"These, torch's of 512 x 2,048 x 5,632, reach billions of operations a second: {', '.join(told)}."
    yield ""
    yield "| | " + " | ".join(measures) + " |"
    yield "|---|" + "---|" * len(measures)
    for contest in summary.contests_of(rows):
        for contestant in summary.contestants_of(rows, contest):
            cells = [_cell(summary.figure(rows, contest, contestant, measure)) for measure in measures]
            yield f"| {contestant} | " + " | ".join(cells) + " |"
            bare = [_cell(summary.figure(rows, contest, contestant, f"bare {measure}")) for measure in measures]
            if any(cell != "-" for cell in bare):
                yield f"| {contestant}, the bare step | " + " | ".join(bare) + " |"
        cells = [f"{summary.limit(rows, contest, m):.1f}" if m.startswith("decode") else "" for m in measures]
        gigabytes = summary.bandwidth(rows, contest) / 1e9
        yield f"| *{contest}: weights read at {gigabytes:.1f} GB/s* | " + " | ".join(cells) + " |"


def _cell(figure: summary.Figure | None) -> str:
    if figure is None:
        return "-"
    share = "" if figure.share is None else f" ({figure.share:.2f})"
    return f"{figure.tokens_a_second:.1f}{share}"


def _startup(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row["row"] == "startup"]
    if not own:
        return
    yield "| | process start to first token | most resident memory | of it private, at the end |"
    yield "|---|---|---|---|"
    for label in dict.fromkeys(row["contestant"] for row in own):
        runs = [row for row in own if row["contestant"] == label]
        first, peak, private = (
            statistics.median(r[name] for r in runs) for name in ("first_token_s", "VmHWM", "RssAnon")
        )
        yield f"| {label} | {first:.2f} s | {format_bytes(peak)} | {format_bytes(private)} |"


def _exactness(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row["row"] == "exactness"]
    if own:
        yield "| against the float32 forward | served log-probabilities, largest error | mean KLD | same top-1 |"
        yield "|---|---|---|---|"
    for row in own:
        yield (f"| {row['contestant']} | {row['logprob_error']:.1e} | {row['mean_kld']:.1e} | {row['same_top1']:.1%} |")
    same = [row for row in rows if row["row"] == "same_model"]
    if same:
        klds = ", ".join(f"{row['contestant']} {row['kld']:.1e}" for row in same)
        yield from [""] if own else []
        yield f"KLD of the next token after one prompt against torch in float32: {klds}."


def _context(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row["row"] == "context"]
    if own:
        yield "| tokens before | bare step |"
        yield "|---|---|"
    for tokens in sorted({row["tokens"] for row in own}):
        seconds = statistics.median(row["seconds"] for row in own if row["tokens"] == tokens)
        yield f"| {tokens:,} | {1e3 * seconds:.2f} ms |"


def _neighbour(rows: Sequence[Row]) -> Iterator[str]:
    shares = summary.neighbour_shares(rows)
    if shares:
        kept = ", ".join(f"{label} {share:.2f}" for label, share in shares.items())
        yield f"Decoding of one prompt with a busy process on one core, as a share of the idle rate: {kept}."


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    found = list(summary.verdicts(rows))
    if found:
        yield "| goal | asked | found | |"
        yield "|---|---|---|---|"
    for verdict in found:
        sign = "at most" if verdict.is_most else "at least"
        met = "met" if verdict.is_met else "missed"
        yield f"| {verdict.text} | {sign} {verdict.asked:g} | {verdict.found:.3g} | {met} |"


def _settings(rows: Sequence[Row]) -> Iterator[str]:
    """Versions, and the settings that each measure was taken with."""
    for row in _first_of_each(rows, "about"):
        about = row["about"]
        yield f"- {row['contestant']}: {about['version']}; {about['build']}"
    for label in dict.fromkeys(row["contestant"] for row in rows if row["row"] == "chosen"):
        if label.startswith(OURS):
            continue
        tried = {
            _text(row["variant"]): row["about"]["settings"]
            for row in rows
            if row["row"] == "about" and row["contestant"] == label
        }
        chosen: dict[str, list[str]] = {}
        for row in rows:
            if row["row"] == "chosen" and row["contestant"] == label:
                chosen.setdefault(_text(row["variant"]), []).append(row["measure"])
        yield f"- {label}, tried: {'; '.join(tried)}"
        for variant, names in chosen.items():
            yield f"    - fastest for {', '.join(names)}: {_text(tried[variant])}"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["row"] == "failed":
            variant = f" with {_text(row['variant'])}" if row.get("variant") else ""
            yield f"- not measured: {row['contestant']}{variant}, {row['measure']}: {row['why']}"


def _first_of_each(rows: Sequence[Row], kind: str) -> list[Row]:
    found: dict[str, Row] = {}
    for row in rows:
        if row["row"] == kind:
            found.setdefault(row["contestant"], row)
    return list(found.values())


def _text(variant: Row) -> str:
    pairs = {**variant, **variant.get("properties", {}), **variant.get("env", {})}
    return (
        " ".join(f"{name}={value}" for name, value in pairs.items() if name not in ("properties", "env")) or "defaults"
    )
