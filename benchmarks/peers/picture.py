"""A run as a picture: a panel a measure, bars of the engines by width of weights, and what the bandwidth allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import summary
from benchmarks.peers.contests import OURS
from benchmarks.peers.summary import Row
from fastgpt_jax.errors import UserError

PANELS = ("decode 1", "decode 8", "decode 32", "prefill 512", "prefill 128")
MOST_PANELS = 4
LIMITED = ("decode 1", "decode 8")
"""What memory binds; larger batches and prefill are bound by arithmetic, far below it."""
COLOURS = {OURS: "#c1440e", "llama.cpp": "#4477aa", "openvino": "#228833", "ctranslate2": "#aa7733", "torch": "#888888"}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draws every shape that was timed, a line of panels each.

    Raises:
      UserError: Nothing was timed, matplotlib is missing, or the file cannot be written.
    """
    shapes = [shape for shape in summary.shapes_of(rows) if summary.contests_of(summary.of_shape(rows, shape))]
    if not shapes:
        raise UserError("--picture needs a run in which engines were timed, of --only int8, int4, bfloat16 or float32")
    try:
        # Only pictures need it.
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        raise UserError("--picture needs matplotlib: pip install matplotlib") from None
    found = summary.measures_of(rows)
    panels = [name for name in PANELS if name in found][:MOST_PANELS]
    size = (4.6 * len(panels), 3.8 * len(shapes))
    figure, grid = pyplot.subplots(len(shapes), len(panels), figsize=size, layout="constrained", squeeze=False)
    for line, shape in zip(grid, shapes, strict=True):
        own = summary.of_shape(rows, shape)
        for axes, measure in zip(line, panels, strict=True):
            _draw_panel(axes, own, measure)
            axes.set_title(f"{shape}, {measure}")
    figure.legend(handles=_legend(pyplot, rows), loc="outside lower center", ncols=6, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --picture {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _draw_panel(axes: Any, rows: Sequence[Row], measure: str) -> None:
    """Groups of bars, one a contest; a dashed line over a group is the limit of the memory."""
    ticks, left = {}, 0.0
    for contest in summary.contests_of(rows):
        begin = left
        for contestant in summary.contestants_of(rows, contest):
            figure = summary.figure(rows, contest, contestant, measure)
            if figure is not None:
                height, (least, most) = figure.tokens_a_second, figure.spread
                axes.bar(left, height, 0.9, color=_colour(contestant))
                axes.errorbar(left, height, [[height - least], [most - height]], color="black", lw=0.8, capsize=2)
                axes.annotate(
                    f"{height:.3g}" if height < 1000 else f"{height:,.0f}",
                    (left, most),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    size=8,
                )
            left += 1
        if measure in LIMITED:
            limit = summary.limit(rows, contest, measure)
            axes.hlines(limit, begin - 0.5, left - 0.5, color="black", ls="--", lw=1.2)
        ticks[(begin + left - 1) / 2] = contest
        left += 1
    axes.set_xticks(list(ticks), ticks.values())
    axes.set_ylabel("tokens/s")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(contestant: str) -> str:
    return next(colour for engine, colour in COLOURS.items() if contestant.startswith(engine))


def _legend(pyplot: Any, rows: Sequence[Row]) -> list[Any]:
    labels = {row["contestant"] for row in rows if row["row"] == "time"}
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=colour, label=engine)
        for engine, colour in COLOURS.items()
        if any(label.startswith(engine) for label in labels)
    ]
    return [*handles, pyplot.Line2D([], [], color="black", ls="--", label="weights read at the measured bandwidth")]
