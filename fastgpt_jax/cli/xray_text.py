"""The X-ray as plain text: what is cached, what each pass did, the masks, and the program after one of the passes."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_jax.cli.tables import format_bytes, format_count, format_seconds, format_table
from fastgpt_jax.compiler.listing import Listing, Row
from fastgpt_jax.compiler.mask_pictures import MaskPicture
from fastgpt_jax.compiler.xray import CompiledStep, Stage, XRay

_SHADES = " .:#"
_MASK_COLUMNS = 24


def render_text(found: XRay, shown: str) -> str:
    """The X-ray with the program after the stage `shown`."""
    params = "" if found.num_params is None else f", {found.num_params:,} parameters"
    machine = found.machine
    parts = [
        f"{found.name}: {found.step} at {found.capacity:,} tokens{params}\n"
        f"roofline of {machine.name}: {machine.balance:.0f} FLOPs a byte",
        "\n".join(_cache(found)),
        format_table(
            [_stage_row(stage) for stage in found.stages],
            ("pass", "numerics", "matched", "missed", "operations", "FLOPs", "bytes", "seconds"),
        ),
    ]
    parts += [_compiled(found.compiled)] if found.compiled is not None else []
    parts += ["\n".join(found.notes)] if found.notes else []
    remarks = [*_remarks(found)]
    parts += ["\n".join(remarks)] if remarks else []
    parts += ["\n".join(_mask(picture)) for picture in found.masks.pictures]
    parts += ["\n".join(found.masks.notes)] if found.masks.notes else []
    stage = next(stage for stage in reversed(found.stages) if stage.name == shown)
    if stage.listing is not None:
        parts.append("\n".join([f"the program, {shown}:", *_program(stage.listing, found)]))
    return "\n\n".join(parts)


def _cache(found: XRay) -> Iterator[str]:
    layout = found.cache
    yield f"cached: {layout.bytes_per_token:,} bytes a token; carried: {layout.bytes_per_request:,} bytes a request"
    for entry in layout.entries:
        layers = f"{entry.layers} x " if entry.layers > 1 else ""
        unit = "token" if entry.kind == "kv" else "request"
        shape = f"{layers}{entry.dtype}{list(entry.shape)}"
        yield f"  {entry.name}: {shape}, {entry.nbytes:,} bytes a {unit} ({entry.source})"


def _stage_row(stage: Stage) -> tuple[str, ...]:
    return (
        stage.name,
        stage.numerics,
        str(stage.matched) if stage.numerics else "",
        str(len(stage.missed)) if stage.numerics else "",
        f"{stage.num_ops}",
        format_count(stage.flops),
        format_bytes(stage.nbytes),
        format_seconds(stage.seconds) if stage.numerics else "",
    )


def _compiled(step: CompiledStep) -> str:
    libraries = ", ".join(f"{count} x {name}" for name, count in step.libraries)
    loops = f"\ncounted once, for want of their trips: {', '.join(step.unknown_loops)}" if step.unknown_loops else ""
    return (
        f"compiled: {format_count(step.flops)} FLOPs, {format_bytes(step.nbytes)} read and written; waits for "
        f"{'arithmetic' if step.bound == 'compute' else 'memory'}, {format_seconds(step.seconds)} at least"
        + (f"\nrun by libraries: {libraries}" if libraries else "")
        + loops
    )


def _remarks(found: XRay) -> Iterator[str]:
    for stage in found.stages:
        for text, count in stage.made:
            yield f"made by {stage.name}: {text}" + (f" ({count} times)" if count > 1 else "")
        for text in stage.missed:
            yield f"missed by {stage.name}: {text}"


def _mask(picture: MaskPicture) -> Iterator[str]:
    heads = f", {picture.num_heads} heads differ and the first is shown" if picture.num_heads > 1 else ""
    yield f"mask of {picture.layer_text}, {picture.origin} ({picture.source}), {picture.num_tokens} tokens{heads}:"
    step = -(-len(picture.rows) // _MASK_COLUMNS)
    for row in picture.rows[::step]:
        levels = [int(digit, 16) for digit in row[::step]]
        yield "  " + "".join(_SHADES[0 if not x else 3 if x == 15 else 1 + (x > 7)] * 2 for x in levels).rstrip()


def _program(listing: Listing, found: XRay) -> Iterator[str]:
    names = {number: f"{name}" for number, _, name in listing.inputs}
    starts = {repeat.start: repeat for repeat in listing.repeats}
    end, is_inside = -1, False
    for i, row in enumerate(listing.rows):
        if is_inside and i == end:
            yield "}"
            is_inside = False
        if i in starts:
            yield f"{starts[i].count} times {{"
            end, is_inside = i + starts[i].length, True
        yield ("  " if is_inside else "") + _line(row, names, found)
    if is_inside:
        yield "}"


def _line(row: Row, names: dict[int, str], found: XRay) -> str:
    results = ", ".join(f"%{number}: {kind}" for number, kind in row.results) or "()"
    operands = " ".join(x if isinstance(x, str) else names.get(x, f"%{x}") for x in row.operands)
    facts = [f"by {row.made_by}"] if row.made_by else []
    if row.source is not None:
        facts.append(f"{found.sources[row.source[0]].path.rpartition('/')[2]}:{row.source[1]}")
    if row.is_prepared:
        facts.append("prepared")
    elif row.nbytes:
        facts.append(f"{format_count(row.flops)}FLOP {format_bytes(row.nbytes)} {row.bound}")
    params = f"[{row.params}]" if row.params else ""
    text = f"{'  ' * row.depth}{results} = {row.name}{params} {operands}".rstrip()
    return f"{text}  # {', '.join(facts)}" if facts else text
