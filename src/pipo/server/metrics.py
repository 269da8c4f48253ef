"""Counters for Prometheus, in a registry of their own, and rates over the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipo.serving.contract import EngineStats, Summary

# seconds: from a small model in RAM to a large one on a slow drive
_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_EACH_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IN_QUEUE = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600)
RATE_WINDOW_S = 10.0
_LEAST_GAP_S = 0.25  # between two samples that rates are made of


class Metrics:
    """Threads: the event loop's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.limit_bytes = 0
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self._requests = Counter(
            "pipo_requests", "HTTP requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._ttft = self._histogram("pipo_ttft_seconds", "From request to first token.", _FIRST_TOKEN)
        self._tpot = self._histogram("pipo_tpot_seconds", "Per token after the first.", _EACH_TOKEN)
        self._queued = self._histogram("pipo_queue_seconds", "Before a request was begun.", _IN_QUEUE)
        self._samples: deque[_Sample] = deque()

    def note_request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def note(self, summary: Summary) -> None:
        """An answer is whole."""
        self._queued.observe(summary.queued_s)
        if summary.usage.completion_tokens:
            self._ttft.observe(summary.ttft_s)
        if summary.usage.completion_tokens > 1:
            self._tpot.observe(summary.decode_s / (summary.usage.completion_tokens - 1))

    def render(self, stats: EngineStats | None) -> bytes:
        """The text format. Source: Prometheus, exposition formats."""
        self._engine.stats = stats
        return generate_latest(self.registry)

    def rates(self, stats: EngineStats, now_s: float | None = None) -> dict[str, float]:
        """Per second, over the time since a sample of ten seconds ago, or since the oldest there is."""
        now_s = time.monotonic() if now_s is None else now_s
        while len(self._samples) > 1 and self._samples[1].at_s <= now_s - RATE_WINDOW_S:
            self._samples.popleft()
        oldest = self._samples[0] if self._samples else _Sample(now_s, stats)
        if not self._samples or now_s - self._samples[-1].at_s >= _LEAST_GAP_S:
            self._samples.append(_Sample(now_s, stats))
        return _rates(oldest, _Sample(now_s, stats))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    stats: EngineStats


def _rates(old: _Sample, new: _Sample) -> dict[str, float]:
    seconds = new.at_s - old.at_s
    wall_s = new.stats.wall_s - old.stats.wall_s

    def per_s(name: str) -> float:
        return float(getattr(new.stats, name) - getattr(old.stats, name)) / seconds if seconds > 0 else 0.0

    stalled_s = sum(new.stats.stall_s.values()) - sum(old.stats.stall_s.values())
    return {
        "window_s": seconds,
        "completion_tokens_per_s": per_s("completion_tokens"),
        "prompt_tokens_per_s": per_s("prompt_tokens"),
        "bytes_read_per_s": per_s("bytes_read"),
        "passes_per_s": per_s("num_passes"),
        "compute_share": min((new.stats.compute_s - old.stats.compute_s) / wall_s, 1.0) if wall_s > 0 else 0.0,
        "stall_share": min(stalled_s / wall_s, 1.0) if wall_s > 0 else 0.0,
        "busy_share": min(wall_s / seconds, 1.0) if seconds > 0 else 0.0,
    }


class _EngineCollector(Collector):
    """What the engine counts, as it was asked last."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        yield GaugeMetricFamily("pipo_ready", "1 once the model is loaded.", value=0 if stats is None else 1)
        if stats is None:
            return
        yield GaugeMetricFamily("pipo_queue_length", "Requests that wait.", value=stats.num_waiting)
        yield GaugeMetricFamily("pipo_running", "Requests that are answered.", value=stats.num_running)
        yield GaugeMetricFamily("pipo_unread_tokens", "Of prompts that are being read.", value=stats.num_unread)
        yield CounterMetricFamily("pipo_prompt_tokens", "Tokens of prompts.", value=stats.prompt_tokens)
        yield CounterMetricFamily("pipo_cached_tokens", "Those that were cached.", value=stats.cached_tokens)
        yield CounterMetricFamily("pipo_completion_tokens", "Tokens of answers.", value=stats.completion_tokens)
        yield CounterMetricFamily("pipo_passes", "Sweeps over all blocks.", value=stats.num_passes)
        yield CounterMetricFamily("pipo_bytes_read", "Weights read from the drive.", value=stats.bytes_read)
        yield CounterMetricFamily("pipo_compute_seconds", "Of all passes, computing.", value=stats.compute_s)
        yield CounterMetricFamily("pipo_pass_seconds", "Of all passes.", value=stats.wall_s)
        stalls = CounterMetricFamily("pipo_stall_seconds", "Compute waiting for bytes, by cause.", labels=("cause",))
        for cause, seconds in stats.stall_s.items():
            stalls.add_metric((cause,), seconds)
        yield stalls
        held = GaugeMetricFamily("pipo_ledger_bytes", "The budget's account, by name.", labels=("name",))
        for name, num_bytes in stats.ledger.items():
            held.add_metric((name,), num_bytes)
        yield held
        yield GaugeMetricFamily("pipo_limit_bytes", "The budget.", value=stats.limit_bytes)
        yield GaugeMetricFamily("pipo_anonymous_bytes", "Memory in use, of all processes.", value=stats.anonymous_bytes)
        yield GaugeMetricFamily("pipo_peak_bytes", "The most that was in use.", value=stats.peak_bytes)
