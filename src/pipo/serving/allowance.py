"""What the asking process takes of the budget: declared before the engine is planned, and kept."""

from __future__ import annotations

from pipo.base.units import MIB, round_up
from pipo.hardware.memory import process_memory

STEP_BYTES = 8 * MIB
# what it grows by while it asks: texts on their way, answers that are being put together. Measured in docs/log.md
ASKING_GROWTH_BYTES = 16 * MIB


def asking_bytes(least_bytes: int = 0, growth_bytes: int = ASKING_GROWTH_BYTES) -> int:
    """Of this process, once it has imported and opened all that it will: what it takes now, or `least_bytes` where that
    is more, so that a plan is the same on every run; and what it will grow by.
    """
    return round_up(max(process_memory().anonymous_bytes, least_bytes), STEP_BYTES) + growth_bytes
