"""`--ram` and `--vram` as people write them: a size, a share of what is available, or "auto"."""

from __future__ import annotations

import re

from pipo.base.errors import UsageError
from pipo.base.units import MAX_SIZE_BYTES, MIB, parse_size
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
    return int(available_memory().limit_bytes * _share(percent[1], text, "--ram"))


def part_of(text: str | None, whole_bytes: int, *, what: str) -> int:
    """`--ram` or `--vram` for a machine that has `whole_bytes`: all of it for None and "auto". Raises UsageError."""
    whole_bytes = min(whole_bytes, MAX_SIZE_BYTES)  # a profile comes from a file
    if text is None or text == "auto":
        return whole_bytes
    percent = _PERCENT.fullmatch(text)
    return int(whole_bytes * _share(percent[1], text, what)) if percent else parse_size(text, what=what)


def _share(number: str, text: str, what: str) -> float:
    """0 to 1."""
    if not 0 < float(number) <= 100:
        raise UsageError(f"{what} {text!r:.80} must be more than 0% and at most 100%")
    return float(number) / 100


def vram_bytes(text: str, free_bytes: int) -> int:
    """`"6GB"` or `"auto"`: all that is free on the device but 512 MiB, or but a tenth where that is more.

    Raises UsageError.
    """
    if text == "auto":
        return max(free_bytes - max(_LEFT_ON_DEVICE_BYTES, free_bytes // 10), 0)
    return parse_size(text, what="--vram")
