"""The free list of slots; a slot is a row of every carried state and of the table of pages."""

from __future__ import annotations

import heapq


class SlotPool:
    """Hands out the lowest free slot, so that a run repeats exactly.

    Invariants: every slot is free or held, never both; free and held ones together are all slots.
    """

    def __init__(self, num_slots: int):
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> frozenset[int]:
        """Slots in use."""
        return frozenset(self._held)

    def acquire(self) -> int:
        """Takes the lowest free slot; raises RuntimeError where there is none."""
        if not self._free:
            raise RuntimeError(f"all {self._num_slots} slots are held; ask num_free first")
        slot = heapq.heappop(self._free)
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back; raises RuntimeError where it is not held."""
        if slot not in self._held:
            raise RuntimeError(f"slot {slot} is not held; held are {sorted(self._held)}")
        self._held.remove(slot)
        heapq.heappush(self._free, slot)

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        if sorted([*self._free, *self._held]) != list(range(self._num_slots)):
            raise RuntimeError(f"slots are lost or doubled: free {sorted(self._free)}, held {sorted(self._held)}")
