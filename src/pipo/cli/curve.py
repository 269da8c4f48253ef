"""Tokens per second by batch size: as lines of a terminal, as SVG, as JSON."""

from __future__ import annotations

from collections.abc import Iterator

from pipo.base import svg
from pipo.base.units import format_size
from pipo.cli.report import LANE_NAMES, rate_text, seconds_text
from pipo.planner.batch import NEAR, BatchCurve, BatchPoint, Ending

BATCH_NOTE = (
    "for `pipo batch`, `pipo serve` and pipo.LLM(…, num_sequences=N); `run` and `chat` answer one sequence at a time"
)
BAR_WIDTH = 40  # of the plateau
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 416, 64, 24, 88, 48
CURVE, KNEE = "#2f6db5", "#c8632b"
_ENDINGS = {
    Ending.MEMORY: "keys and values of more sequences do not fit",
    Ending.KV_TRAFFIC: "every sequence's own keys and values take longer than the weights that all share",
    Ending.COMPUTE: "computing for so many takes longer than getting the weights there",
    Ending.WEIGHTS: "keys and values of more take the place of weights, which then move or compute elsewhere",
}


def plot_lines(curve: BatchCurve) -> Iterator[str]:
    """A bar a batch size, the knee marked. At most 16 lines."""
    knee, plateau = curve.knee, curve.plateau
    width = max(len(str(point.num_sequences)) for point in curve.points)
    for point in curve.points:
        bar = "█" * max(round(BAR_WIDTH * point.tokens_per_s / plateau), 1)
        mark = f"  ◀ within {1 - NEAR:.0%} of the plateau" if point is knee else ""
        yield f"{point.num_sequences:>{width}}  {bar:<{BAR_WIDTH}}  {rate_text(point.tokens_per_s)} tokens/s{mark}"


def advice(curve: BatchCurve) -> Iterator[tuple[str, str]]:
    knee = curve.knee
    yield "best", f"{_sequences(knee)}: {rate_text(knee.tokens_per_s)} tokens/s, {_per_sequence(knee)}"
    yield "why", _ENDINGS[curve.ending]
    yield "at best", f"busiest: {LANE_NAMES[knee.lane]}; KV cache {format_size(knee.kv_bytes)}"
    yield "note", BATCH_NOTE


def _sequences(point: BatchPoint) -> str:
    return "1 sequence" if point.num_sequences == 1 else f"{point.num_sequences} sequences at a time"


def _per_sequence(point: BatchPoint) -> str:
    every = f"{1000 * point.pass_s:.0f} ms" if point.pass_s < 1 else seconds_text(point.pass_s)
    return f"a token of each every {every}"


def as_dict(curve: BatchCurve) -> dict[str, object]:
    return {
        "plateau_tokens_per_s": curve.plateau,
        "best_num_sequences": curve.knee.num_sequences,
        "ending": curve.ending.name.lower(),
        "points": [
            {
                "num_sequences": point.num_sequences,
                "tokens_per_s": point.tokens_per_s,
                "ttft_s": point.ttft_s,
                "pass_s": point.pass_s,
                "kv_bytes": point.kv_bytes,
                "streamed_bytes": point.streamed_bytes,
                "lane": point.lane.value,
                "kv_share": point.kv_share,
            }
            for point in curve.points
        ],
    }


def picture(curve: BatchCurve, title: str, *lines: str) -> str:
    """An SVG file: batch size doubling to the right, tokens per second upwards. Up to two `lines` under the title."""
    top = curve.plateau * 1.1
    places = [(_x(i, len(curve.points)), _y(point.tokens_per_s, top)) for i, point in enumerate(curve.points)]
    elements = [
        svg.text(16, 24, title, size=16, weight=600),
        *(svg.text(16, 43 + 16 * i, line, size=12) for i, line in enumerate(lines)),
        *_axes(curve, top),
        svg.polyline(places, CURVE),
        *(svg.dot(x, y, CURVE) for x, y in places),
        *_knee(curve, places),
    ]
    return svg.document(WIDTH, HEIGHT, title, elements)


def _x(idx: int, num_points: int) -> float:
    return LEFT + (idx + 0.5) * (WIDTH - LEFT - RIGHT) / num_points


def _y(tokens_per_s: float, top: float) -> float:
    return HEIGHT - BOTTOM - tokens_per_s / top * (HEIGHT - TOP - BOTTOM)


def _axes(curve: BatchCurve, top: float) -> Iterator[str]:
    step = svg.round_step(top)
    for i in range(int(top / step) + 1):
        y = _y(i * step, top)
        yield svg.line(LEFT, y, WIDTH - RIGHT, y)
        yield svg.text(LEFT - 8, y + 4, f"{i * step:g}", size=11, anchor="end")
    for i, point in enumerate(curve.points):
        x = _x(i, len(curve.points))
        yield svg.text(x, HEIGHT - BOTTOM + 18, str(point.num_sequences), size=11, anchor="middle")
    yield svg.text((LEFT + WIDTH) / 2, HEIGHT - 10, "sequences at a time", size=12, anchor="middle")
    yield svg.text(16, TOP - 6, "tokens/s", size=12)


def _knee(curve: BatchCurve, places: list[tuple[float, float]]) -> Iterator[str]:
    x, y = places[list(curve.points).index(curve.knee)]
    yield svg.line(x, HEIGHT - BOTTOM, x, y, KNEE)
    yield svg.dot(x, y, KNEE, radius=5)
    anchor = "end" if x > WIDTH / 2 else "start"
    words = f"{_sequences(curve.knee)}, {rate_text(curve.knee.tokens_per_s)} tokens/s"
    yield svg.text(x - 8 if anchor == "end" else x + 8, y + 20, words, size=12, weight=600, anchor=anchor, colour=KNEE)
