"""What `fastgpt compile` says: the plan before it compiles, and the tables when the artifact is written.

Knows the plan and the manifest alone, so that the tables of an artifact can be printed at any time.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Sequence

from fastgpt_jax.artifact.manifest import EntryPointRecord, Manifest, PassRecord
from fastgpt_jax.cli.tables import format_bytes, format_count, format_seconds, format_table
from fastgpt_jax.compiler.bucket_plan import BucketPlan
from fastgpt_jax.compiler.build import BuildReport

BASE_S = 0.65
SECONDS_PER_OP = 0.0015
FULL_SAMPLER_S = 1.1
"""What compiling an entry point took, by the model's operations: measured on two x86-64 cores with jax 0.10.2, over
models of 294 to 1,985 operations."""


def estimate_seconds(plan: BucketPlan, num_ops: int) -> float:
    """How long compiling the plan may take, in seconds.

    Args:
      num_ops: Operations of the model's forward, layers written out.
    """
    full = sum(FULL_SAMPLER_S for key in plan.buckets.keys() if key.variant == "full")
    return full + plan.num_entry_points * (BASE_S + SECONDS_PER_OP * num_ops)


def plan_text(plan: BucketPlan, num_ops: int) -> str:
    """The plan in four lines."""
    by_len = [
        f"{length} x {' or '.join(map(str, plan.buckets.prefill_rows(length)))}" for length in plan.buckets.chunk_lens
    ]
    seconds = estimate_seconds(plan, num_ops)
    rows = [
        (
            "prefill",
            f"{', '.join(by_len)} (tokens x requests); {_share(plan.prefill_waste)} padding",
            plan.prefill_basis,
        ),
        (
            "decode",
            f"{', '.join(map(str, plan.buckets.decode))} requests; {_share(plan.decode_waste)} padding",
            plan.decode_basis,
        ),
    ]
    lines = [f"{name.ljust(8)} {what} for {basis}" for name, what, basis in rows]
    count = f"{plan.num_entry_points} entry points, about {format_seconds(seconds / plan.num_entry_points)} each"
    return "\n".join([*lines, f"compile  {count}, {format_seconds(seconds)} in all"])


def entry_point_table(manifest: Manifest) -> str:
    """A row an entry point: its work as a graph and compiled, its memory, what compiling it took and what it weighs."""
    sizes = {record.path: record.nbytes for record in manifest.files}
    rows = [
        (
            record.key.name,
            format_count(record.flops),
            _at_least(record) + format_count(record.program.work.flops),
            format_bytes(record.nbytes),
            _at_least(record) + format_bytes(record.program.work.nbytes),
            format_bytes(record.program.peak_bytes),
            format_seconds(record.program.seconds),
            format_bytes(sizes.get(record.program.code, 0)),
        )
        for record in manifest.entry_points
    ]
    header = ("entry point", "FLOPs", "after XLA", "bytes", "after XLA", "peak memory", "compiled in", "size")
    loops = [f"{r.key.name}: {name}" for r in manifest.entry_points for name in r.program.work.unknown_loops]
    notes = [f"counted once, for want of their trips: {', '.join(loops)}"] if loops else []
    return "\n".join([format_table(rows, header), *notes])


def pass_table(manifest: Manifest) -> str:
    """A row a pass of the pipeline, all entry points together."""
    pipelines = [record.passes for record in manifest.entry_points]
    runs_of_each = [[x for x in runs if x is not None] for runs in itertools.zip_longest(*pipelines)]
    is_checked = any(runs[0].change is not None for runs in runs_of_each)
    rows = [(*_pass_row(runs), *([_logit_change(runs[0])] if is_checked else [])) for runs in runs_of_each]
    header = ("pass", "numerics", "matched", "missed", "operations", "FLOPs", "bytes", "seconds")
    return format_table(rows, (*header, *(["logits changed by"] if is_checked else [])))


def sparsity_text(manifest: Manifest) -> str:
    """What was left out of each layer's attention, and the rows of caches that each entry point reads."""
    lines: dict[str, list[str]] = {}
    for record in manifest.entry_points:
        for run in record.passes:
            if run.name in ("sparse_attention", "narrow_reads"):
                for text in map(_what, (*run.notes, *run.remarks)):
                    lines.setdefault(text, []).append(record.key.name)
    everywhere = len(manifest.entry_points)
    return "\n".join(text if len(at) == everywhere else f"{', '.join(at)}: {text}" for text, at in lines.items())


def _what(text: str) -> str:
    """A note without the line and the operation that it begins with."""
    return text.split(": ", 2)[-1]


def quality_table(manifest: Manifest) -> str:
    """A row for everything that rounds: how far the model is from the one that was given."""
    rows = [
        (
            record.after,
            f"{record.mean_kld:.6f}",
            f"{record.kld_999:.4f}",
            f"{100 * record.same_top1:.2f} %",
            f"{record.perplexity:.3f}",
        )
        for record in manifest.quality
    ]
    text, count = manifest.quality[0].text, manifest.quality[0].num_tokens
    table = format_table(rows, ("after", "mean KLD", "99.9% KLD", "same top-1", "perplexity"))
    return f"{table}\nagainst the model as given, on {count:,} tokens of {text}; KLD in nats"


def summary(report: BuildReport) -> str:
    """Where the artifact lies, what it weighs, and how to serve it."""
    manifest = report.manifest
    weight_files = {record.file for record in manifest.weights}
    weight_bytes = sum(record.nbytes for record in manifest.files if record.path in weight_files)
    all_bytes = sum(record.nbytes for record in manifest.files)
    reused = f", {len(report.reused)} programs found compiled" if report.reused else ""
    prompt = "--prompt 'Once upon a time'" if manifest.model.tokenizer is not None else "--prompt_ids 1,2,3"
    return (
        f"{report.output}: {format_bytes(all_bytes)}, {format_bytes(weight_bytes)} of it weights; "
        f"written in {format_seconds(report.seconds)}{reused}\n"
        f"serve it with: fastgpt generate --model {shlex.quote(str(report.output))} {prompt}"
    )


def _at_least(record: EntryPointRecord) -> str:
    return ">= " if record.program.work.unknown_loops else ""


def _pass_row(runs: Sequence[PassRecord]) -> tuple[str, ...]:
    return (
        runs[0].name,
        runs[0].numerics,
        str(sum(run.matched for run in runs)),
        str(sum(run.missed for run in runs)),
        _change(run.ops for run in runs),
        _change(run.flops for run in runs),
        _change(run.nbytes for run in runs),
        format_seconds(sum(run.seconds for run in runs)),
    )


def _logit_change(run: PassRecord) -> str:
    if run.change is None:
        return ""
    return "0" if not run.change.absolute else f"{run.change.absolute:.1e} ({run.change.relative:.1e} of the largest)"


def _change(pairs: Iterable[tuple[int, int]]) -> str:
    """A sum before and after."""
    before, after = (sum(numbers) for numbers in zip(*pairs, strict=True))
    if before == after:
        return format_count(before)
    return f"{format_count(before)} -> {format_count(after)}"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"
