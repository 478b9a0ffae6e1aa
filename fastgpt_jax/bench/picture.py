"""Latency against load as a picture: one panel for the first token, one for the others, and what the server gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt_jax.bench.record import PERCENTILES
from fastgpt_jax.errors import UserError


def draw(path: Path, rows: Sequence[Mapping[str, Any]], load_name: str) -> None:
    """Draws summaries that have a `load`, one a level.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        # Only pictures need it.
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        raise UserError("--picture needs matplotlib: pip install matplotlib") from None
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    loads = [row["load"] for row in rows]
    for panel, name, title in zip(
        panels, ("ttft_ms", "tpot_ms"), ("time to first token", "time a token"), strict=False
    ):
        for percentile in PERCENTILES:
            values = [(row[name] or {}).get(f"p{percentile}") for row in rows]
            panel.plot(loads, values, marker="o", label=f"p{percentile}")
        panel.set(xlabel=load_name, ylabel="ms", title=title, ylim=(0, None))
        panel.legend()
    panels[2].plot(loads, [row["output_tokens_per_s"] for row in rows], marker="o")
    panels[2].set(xlabel=load_name, ylabel="tokens/s", title="output", ylim=(0, None))
    for panel in panels:
        panel.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --picture {path}: {error}") from None
    finally:
        pyplot.close(figure)
