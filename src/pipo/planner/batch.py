"""How tokens per second grow with the number of sequences that share a sweep, and what ends it.

After *Mind the Memory Gap* (Recasens et al., arXiv 2503.08311): throughput of decode flattens where every sequence's
own keys and values, or compute, take longer than the weights that all share; the smallest batch near the plateau gives
nearly all of it for the least memory and the shortest wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pipo.planner.cost import PassLoad, attention_seconds, step_costs
from pipo.planner.predict import Placed, Prediction
from pipo.planner.simulate import Lane

NEAR = 0.95  # of the plateau: what the smallest batch worth taking gives


class Ending(Enum):
    """What stops more sequences from giving more."""

    MEMORY = "memory"  # more do not fit
    KV_TRAFFIC = "keys and values"
    COMPUTE = "compute"
    WEIGHTS = "weights"  # whose place keys and values take move in every pass, or compute elsewhere


@dataclass(frozen=True, slots=True)
class BatchPoint:
    """So many sequences at once, as predicted. `lane` is the busiest in decode, `kv_share` what of its seconds goes to
    keys and values, 0 to 1.
    """

    num_sequences: int
    tokens_per_s: float
    ttft_s: float
    pass_s: float
    kv_bytes: int
    streamed_bytes: int
    lane: Lane
    kv_share: float


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """`points` ascend in the number of sequences, without a gap wider than a doubling. One at least."""

    points: Sequence[BatchPoint]

    @property
    def plateau(self) -> float:
        """The most tokens per second of all."""
        return max(point.tokens_per_s for point in self.points)

    @property
    def knee(self) -> BatchPoint:
        """The smallest batch within 5 % of the plateau."""
        return next(point for point in self.points if point.tokens_per_s >= NEAR * self.plateau)

    @property
    def ending(self) -> Ending:
        """What stops the gain: what the step after the knee is busy with."""
        knee = self.knee
        if knee is self.points[-1]:
            return Ending.MEMORY
        after = self.points[list(self.points).index(knee) + 1]
        if after.kv_share > 0.5:
            return Ending.KV_TRAFFIC
        if after.lane in (Lane.DRIVE, Lane.UPLOAD):
            return Ending.WEIGHTS
        return Ending.WEIGHTS if (knee.lane, after.lane) == (Lane.DEVICE, Lane.CPU) else Ending.COMPUTE


def batch_point(placed: Placed, prediction: Prediction, load: PassLoad) -> BatchPoint:
    """`load` is the decode pass of the prediction."""
    lane = busiest(prediction)
    kv_bytes = placed.ram.fixed.get("KV cache", 0) + (placed.device.kv_bytes if placed.device else 0)
    streamed = placed.at(load.num_positions).ram.streamed_bytes + (placed.device.streamed_bytes if placed.device else 0)
    return BatchPoint(
        load.num_sequences, prediction.tokens_per_s, prediction.ttft_s, prediction.decode.seconds,
        kv_bytes, streamed, lane, _kv_share(placed, load, lane),
    )  # fmt: skip


def busiest(prediction: Prediction) -> Lane:
    """The lane that decode leaves the least idle."""
    return max(Lane, key=lambda lane: prediction.decode.busy[lane])


def _kv_share(placed: Placed, load: PassLoad, lane: Lane) -> float:
    """Of a lane's seconds in a pass: attention's where it computes, keys' and values' where it moves bytes."""
    there = placed.on_device
    costs = step_costs(placed.shapes.stages, placed.machine, load, placed.shapes.hidden_size, there)
    if lane is Lane.UPLOAD:
        copied = sum(costs.copy[unit] for unit in placed.streamed_to_device)
        loaded = sum(costs.kv_load.values()) if placed.moves_kv else 0.0
        return loaded / (loaded + copied) if loaded + copied else 0.0
    if lane not in (Lane.CPU, Lane.DEVICE):
        return float(lane is Lane.DOWNLOAD)
    device = placed.machine.devices[1] if lane is Lane.DEVICE else placed.machine.cpu
    ours = [i for i in costs.compute if (i in there) is (lane is Lane.DEVICE)]
    attention = sum(attention_seconds(placed.shapes.stages[i], device, load) for i in ours)
    return attention / (sum(costs.compute[i] for i in ours) or 1.0)
