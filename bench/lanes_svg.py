"""Pictures of what the lanes do over time, as SVG text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipo.base.svg import PALE, document, line, rect, round_step, text

WIDTH, MARGIN_LEFT, MARGIN = 960, 112, 16
TITLE_HEIGHT, LANE_HEIGHT, LANE_GAP, AXIS_HEIGHT = 56, 34, 10, 34
MIN_LABEL_WIDTH = 24


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
    elements = [
        text(MARGIN, 24, picture.title, size=16, weight=600),
        text(MARGIN, 43, picture.subtitle, size=12),
        *_axis(picture),
        *(each for i in range(len(picture.lanes)) for each in _lane(picture, i)),
    ]
    return document(WIDTH, picture.height, picture.title, elements)


def _lane(picture: Picture, idx: int) -> Iterator[str]:
    name, bars = picture.lanes[idx]
    top = TITLE_HEIGHT + idx * (LANE_HEIGHT + LANE_GAP)
    left, right = picture.x(picture.begin), picture.x(picture.end)
    yield text(MARGIN, top + LANE_HEIGHT / 2 + 4, name, size=13)
    yield rect(left, top, right - left, LANE_HEIGHT, PALE, opacity=0.35)
    for bar in bars:
        if bar.end > picture.begin and bar.begin < picture.end:
            yield from _bar(picture, bar, top)


def _bar(picture: Picture, bar: Bar, top: float) -> Iterator[str]:
    left, right = picture.x(bar.begin), picture.x(bar.end)
    yield rect(left, top, max(right - left - 0.6, 0.6), LANE_HEIGHT, bar.colour)
    if right - left >= MIN_LABEL_WIDTH:
        yield text((left + right) / 2, top + LANE_HEIGHT / 2 + 4, bar.label, size=11, anchor="middle", colour="white")


def _axis(picture: Picture) -> Iterator[str]:
    bottom = picture.height - AXIS_HEIGHT
    step = round_step(picture.end - picture.begin)
    for i in range(int((picture.end - picture.begin) / step) + 1):
        x = picture.x(picture.begin + i * step)
        yield line(x, TITLE_HEIGHT, x, bottom)
        yield text(x, bottom + 16, f"{1000 * i * step:g} ms", size=11, anchor="middle")
