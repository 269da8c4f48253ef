"""Places for routed experts: of each size some, as many as the memory that is left holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXPERT_RECORD_BYTES = 4096  # of an expert in a slot: its handle, layout and place


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """Of one size, with what is kept of each expert that is in one."""

    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return self.num_slots * (self.slot_bytes + EXPERT_RECORD_BYTES)


@dataclass(frozen=True, slots=True)
class ExpertClass:
    """Routed experts of one size, of all blocks together. A token passes `num_experts_per_tok` of a block."""

    slot_bytes: int
    num_experts: int
    num_experts_per_tok: int

    def slots(self, num_slots: int) -> ExpertSlots:
        return ExpertSlots(self.slot_bytes, min(num_slots, self.num_experts))

    @property
    def least(self) -> ExpertSlots:
        """For one token in one block."""
        return self.slots(self.num_experts_per_tok)

    @property
    def most(self) -> ExpertSlots:
        return self.slots(self.num_experts)


def share_out(classes: Sequence[ExpertClass], left_bytes: int) -> tuple[ExpertSlots, ...]:
    """The least of each class, and what more fits: of each the same share."""
    wanted = [each.most.num_bytes - each.least.num_bytes for each in classes]
    slots = []
    for each, more in zip(classes, wanted, strict=True):
        share = left_bytes * more // (sum(wanted) or 1)
        slots.append(each.slots(each.least.num_slots + share // each.slots(1).num_bytes))
    return tuple(slots)
