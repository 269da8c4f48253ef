"""Pictures of what the lanes do over time, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, MARGIN_LEFT, MARGIN = 960, 112, 16
TITLE_HEIGHT, LANE_HEIGHT, LANE_GAP, AXIS_HEIGHT = 56, 34, 10, 34
FONT = "font-family='system-ui, sans-serif'"
INK, PALE = "#1f2933", "#d9dee3"
MIN_LABEL_WIDTH = 24
MAX_TICKS = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """From `begin` to `end` seconds."""

    begin: float
    end: float
    label: str
    colour: str


@dataclass(frozen=True, slots=True)
class Picture:
    """`lanes` from top to bottom, each with its bars; drawn from `begin` to `end` seconds."""

    title: str
    subtitle: str
    lanes: Sequence[tuple[str, Sequence[Bar]]]
    begin: float
    end: float

    @property
    def height(self) -> int:
        return TITLE_HEIGHT + len(self.lanes) * (LANE_HEIGHT + LANE_GAP) + AXIS_HEIGHT

    def x(self, seconds: float) -> float:
        share = (min(max(seconds, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return MARGIN_LEFT + share * (WIDTH - MARGIN_LEFT - MARGIN)


def render(picture: Picture) -> str:
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {picture.height}' width='{WIDTH}' {FONT}>",
        f"<title>{escape(picture.title)}</title>",
        f"<rect width='{WIDTH}' height='{picture.height}' fill='white'/>",
        _text(MARGIN, 24, picture.title, size=16, weight=600),
        _text(MARGIN, 43, picture.subtitle, size=12),
        *_axis(picture),
        *(line for i in range(len(picture.lanes)) for line in _lane(picture, i)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _lane(picture: Picture, idx: int) -> Iterator[str]:
    name, bars = picture.lanes[idx]
    top = TITLE_HEIGHT + idx * (LANE_HEIGHT + LANE_GAP)
    left, right = picture.x(picture.begin), picture.x(picture.end)
    yield _text(MARGIN, top + LANE_HEIGHT / 2 + 4, name, size=13)
    yield _rect(left, top, right - left, PALE, opacity=0.35)
    for bar in bars:
        if bar.end > picture.begin and bar.begin < picture.end:
            yield from _bar(picture, bar, top)


def _bar(picture: Picture, bar: Bar, top: float) -> Iterator[str]:
    left, right = picture.x(bar.begin), picture.x(bar.end)
    yield _rect(left, top, max(right - left - 0.6, 0.6), bar.colour)
    if right - left >= MIN_LABEL_WIDTH:
        yield _text((left + right) / 2, top + LANE_HEIGHT / 2 + 4, bar.label, size=11, anchor="middle", colour="white")


def _axis(picture: Picture) -> Iterator[str]:
    bottom = picture.height - AXIS_HEIGHT
    step = _round_step(picture.end - picture.begin)
    for i in range(int((picture.end - picture.begin) / step) + 1):
        x = picture.x(picture.begin + i * step)
        yield f"<line x1='{x:.1f}' y1='{TITLE_HEIGHT}' x2='{x:.1f}' y2='{bottom}' stroke='{PALE}'/>"
        yield _text(x, bottom + 16, f"{1000 * i * step:g} ms", size=11, anchor="middle")


def _round_step(seconds: float) -> float:
    """1, 2 or 5 of a power of ten, so that there are at most MAX_TICKS."""
    power = 10.0 ** math.floor(math.log10(seconds / MAX_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * MAX_TICKS >= seconds)


def _rect(x: float, y: float, width: float, colour: str, opacity: float = 1.0) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{LANE_HEIGHT}' rx='2' "
        f"fill='{colour}' fill-opacity='{opacity:g}'/>"
    )


def _text(
    x: float, y: float, words: str, *, size: int, weight: int = 400, anchor: str = "start", colour: str = INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{colour}'>{escape(words)}</text>"
    )
