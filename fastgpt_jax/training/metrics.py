"""The log of a run: one JSON object a line, appended as training goes and cut back when a run resumes.

Knows nothing of how the numbers were measured. Two kinds of line: `{"step", "loss", "grad_norm"}` (training) and
`{"step", "valid_loss"}` (validation), losses in nats a token.
"""

from __future__ import annotations

import json
from pathlib import Path


class MetricsLog:
    """Invariant: the file holds whole lines with ascending steps."""

    def __init__(self, path: Path):
        self._path = path

    def truncate_after(self, step: int) -> None:
        """Drops the lines past `step`: what a resumed run measures again."""
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        self._path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def append(self, **values: int | float) -> None:
        """Adds one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def entries(self) -> list[dict[str, int | float]]:
        """Reads all lines; none when the run has not started."""
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def curve(self, key: str) -> list[tuple[int, float]]:
        """The points (step, value) of one key."""
        return [(int(entry["step"]), entry[key]) for entry in self.entries() if key in entry]
