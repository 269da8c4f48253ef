"""`--ram` as people write it: a size, a share of what is available, or "auto"."""

from __future__ import annotations

import re

from pipo.base.errors import UsageError
from pipo.base.units import parse_size
from pipo.hardware.memory import auto_budget_bytes, available_memory

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
