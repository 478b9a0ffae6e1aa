"""What a pass says of its run: how often it matched, what it replaced, and for what came close, why it did not."""

from __future__ import annotations

from dataclasses import dataclass

from passes.graph import Op, Source
from passes.rewrite import Rewrite


@dataclass(frozen=True)
class Remark:
    """Something said of an operation and the user's line: why a rewrite that nearly matched did not, for one."""

    reason: str
    op: str
    source: Source

    @classmethod
    def at(cls, op: Op, reason: str) -> Remark:
        """A remark on `op`."""
        return cls(reason, op.name, op.source)

    def __str__(self) -> str:
        return f"{self.source.short}: {self.op}: {self.reason}"


@dataclass(frozen=True)
class PassResult:
    """Counts of one run of a pass; `matched == 0` means that the graph is what it was.

    Attributes:
      rewrites: What was replaced by what, where the pass says so; each is validated by itself.
      notes: What there is to say of rewrites that were made, such as how much they save.
    """

    matched: int = 0
    remarks: tuple[Remark, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    notes: tuple[Remark, ...] = ()

    @property
    def missed(self) -> int:
        """Number of sites that nearly matched."""
        return len(self.remarks)

    def __add__(self, other: PassResult) -> PassResult:
        return PassResult(
            self.matched + other.matched,
            self.remarks + other.remarks,
            self.rewrites + other.rewrites,
            self.notes + other.notes,
        )
