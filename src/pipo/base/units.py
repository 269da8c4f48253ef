"""Sizes and rates as people write them. KB, MB, GB are powers of 1000; KiB, MiB, GiB powers of 1024."""

from __future__ import annotations

import re

from pipo.base.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_BYTES = 4096  # of places in RAM, and what direct reads want of offsets, lengths and addresses
MAX_SIZE_BYTES = 1 << 63  # what a signed 64-bit count holds

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": KIB,
    "m": 10**6, "mb": 10**6, "mib": MIB,
    "g": 10**9, "gb": 10**9, "gib": GIB,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str, *, what: str = "size") -> int:
    """`"6GB"`, `"512MiB"`, `"1.5g"` → bytes. Raises UsageError naming `what`; zero is refused."""
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{what} {text!r:.80} is not a size", hint="write a number and a unit: 512MB, 6GB, 6GiB")
    size = float(match[1]) * factor
    if size >= MAX_SIZE_BYTES:
        raise UsageError(f"{what} {text!r:.80} is more than any machine has", hint="write a smaller number or unit")
    if size < 1:
        raise UsageError(f"{what} {text!r:.80} must be more than zero")
    return int(size)


def format_size(num_bytes: float) -> str:
    """Bytes → `"2.9 GiB"`, three significant digits at most."""
    size, sign = abs(num_bytes), "-" if num_bytes < 0 else ""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{sign}{size / factor:.1f} {unit}"
    return f"{sign}{size:.0f} B"


def format_rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def round_down(value: int, multiple: int) -> int:
    return value // multiple * multiple
