"""Elements of SVG pictures, as text. Written by hand: a picture of a few lines needs no library.

Units: lengths are pixels from the upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

FONT = "font-family='system-ui, sans-serif'"
INK, PALE = "#1f2933", "#d9dee3"
MAX_TICKS = 10


def document(width: int, height: int, title: str, elements: Iterable[str]) -> str:
    """A whole file, on white."""
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {FONT}>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *elements,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(
    x: float, y: float, words: str, *, size: int, weight: int = 400, anchor: str = "start", colour: str = INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{colour}'>{escape(words)}</text>"
    )


def rect(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:g}' rx='2' "
        f"fill='{colour}' fill-opacity='{opacity:g}'/>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = PALE) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:g}' x2='{x2:.1f}' y2='{y2:g}' stroke='{colour}'/>"


def polyline(points: Sequence[tuple[float, float]], colour: str) -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{corners}' fill='none' stroke='{colour}' stroke-width='2'/>"


def dot(x: float, y: float, colour: str, radius: float = 3.5) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:g}' fill='{colour}'/>"


def round_step(length: float) -> float:
    """1, 2 or 5 of a power of ten, so that there are at most MAX_TICKS over the length."""
    power = 10.0 ** math.floor(math.log10(length / MAX_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * MAX_TICKS >= length)
