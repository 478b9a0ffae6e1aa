"""The loss curve of a run as a small PNG; the only file of training that needs matplotlib (extra `train`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastgpt_jax.errors import UserError


def save_loss_curve(
    path: Path, train_points: Sequence[tuple[int, float]], valid_points: Sequence[tuple[int, float]], *, title: str
) -> None:
    """Draws training and validation loss (nats a token) over the step.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional extra; Figure alone needs no display
    except ImportError:
        raise UserError(
            "the loss curve needs matplotlib; install the extra: pip install 'fastgpt-jax[train]'"
        ) from None
    figure = Figure(figsize=(6.0, 3.4), dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train_points, strict=True), linewidth=1.0, label="training")
    if valid_points:
        axes.plot(*zip(*valid_points, strict=True), marker="o", markersize=3, linewidth=1.0, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
