"""`--ram` and `--vram` as people write them: a size, a share of what is available, or "auto"."""

from __future__ import annotations

import re

from pipo.base.errors import UsageError
from pipo.base.units import MIB, parse_size
from pipo.hardware.memory import auto_budget_bytes, available_memory

_LEFT_ON_DEVICE_BYTES = 512 * MIB  # for the driver's scratch and the screen, or a tenth where that is more

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def ram_bytes(text: str) -> int:
    """`"4GB"`, `"50%"` (of what can be taken now) or `"auto"` → bytes. Raises UsageError."""
    if text == "auto":
        return max(auto_budget_bytes(), 0)
    percent = _PERCENT.fullmatch(text)
    if percent is None:
        return parse_size(text, what="--ram")
    share = float(percent[1])
    if not 0 < share <= 100:
        raise UsageError(f"--ram {text!r:.80} must be more than 0% and at most 100%")
    return int(available_memory().limit_bytes * share / 100)


def vram_bytes(text: str, free_bytes: int) -> int:
    """`"6GB"` or `"auto"`: all that is free on the device but 512 MiB, or but a tenth where that is more.

    Raises UsageError.
    """
    if text == "auto":
        return max(free_bytes - max(_LEFT_ON_DEVICE_BYTES, free_bytes // 10), 0)
    return parse_size(text, what="--vram")
