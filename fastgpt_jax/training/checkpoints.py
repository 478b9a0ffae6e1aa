"""Checkpoints of a `TrainState` with Orbax: parameters, optimizer state and step, so that a run resumes exactly.

Knows nothing of models or text. Only the newest two are kept.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from fastgpt_jax.errors import UserError
from fastgpt_jax.training.loop import TrainState


class Checkpoints:
    """A folder of checkpoints, one a step; use as a context manager so that pending writes finish.

    Invariant: a step that `latest_step` names is complete (Orbax renames a finished folder into place).
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._manager.close()

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self._folder

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes `state` under its own step; a step already there is left as it is."""
        step = int(state.step)
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState) -> TrainState:
        """Reads the newest checkpoint into the structure, shapes and dtypes of `like`.

        Raises:
          UserError: There is none, or it was written by a run with other shapes.
        """
        step = self.latest_step
        if step is None:
            raise UserError(f"there is nothing to resume in {self._folder}; start without --resume")
        saved = sorted(leaf.shape for leaf in jax.tree.leaves(self._manager.item_metadata(step).tree))
        expected = sorted(leaf.shape for leaf in jax.tree.leaves(like))
        if saved != expected:
            raise UserError(
                f"checkpoint {step} in {self._folder} is of another model or optimizer: its arrays are {saved[-1]} and "
                f"smaller, {len(saved)} in all, this run's {expected[-1]} and smaller, {len(expected)} in all; "
                "resume with the config that wrote it"
            )
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        restored: Any = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return restored
