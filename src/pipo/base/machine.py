"""What a machine can do, in measured or published figures. Predictions are made from this and a model's shapes alone.

A stage of T tokens over C cached positions on device d: `d.stage_s(work, T, C)`, plus `d.graph_start_s` where it is a
graph of its own (streamed weights; a model that is all in RAM is one graph). A unit on its way from the drive:
`machine.unit_read_s(num_bytes, repacked_as)`; to a device: `d.from_host.seconds(num_bytes)`.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from pipo.base.errors import MalformedProfile
from pipo.base.strict_json import decode, parse
from pipo.base.tensor_type import TensorType

T = TypeVar("T")
_BEYOND = 1e30  # seconds, bytes and rates of any machine; what is made of such figures stays finite


@dataclass(frozen=True, slots=True)
class ProductRate:
    """Seconds per element of a matrix that is multiplied with T rows, by T: (rows, seconds for all the rows).

    Rows ascend from 1. Seconds may fall: kernels that take four rows at once do three of them more slowly. Raises
    MalformedProfile.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        _require(bool(self.points) and self.points[0][0] == 1, "points", "a first point of 1 row", self.points[:1])
        last_rows = 0
        for i, (rows, seconds) in enumerate(self.points):
            _require(rows > last_rows, f"points[{i}][0]", f"more rows than {last_rows}", rows)
            _positive(f"points[{i}][1]", seconds)
            last_rows = rows

    @classmethod
    def roofline(cls, bytes_per_element: float, bytes_per_s: float, flops_per_s: float) -> ProductRate:
        """Of a device known by two published figures: a product takes what its bytes or its two operations per
        element and row take, whichever is longer. Exact at every T.
        """
        for name, figure in (
            ("bytes_per_element", bytes_per_element), ("bytes_per_s", bytes_per_s), ("flops_per_s", flops_per_s)
        ):  # fmt: skip
            _positive(name, figure)
        move_s, row_s = bytes_per_element / bytes_per_s, 2.0 / flops_per_s
        last_flat = math.floor(move_s / row_s)  # the most rows that cost no more than one
        rows = sorted({1, max(last_flat, 1), last_flat + 1, last_flat + 2})
        return cls(tuple((n, max(move_s, n * row_s)) for n in rows if n >= 1))

    def seconds(self, num_elements: float, num_tokens: int) -> float:
        """Of `num_elements` with `num_tokens` rows: straight lines between the points, the last rate per row beyond."""
        assert num_tokens >= 1
        rows_b, b = self.points[-1]
        if num_tokens >= rows_b:
            return num_elements * b * num_tokens / rows_b
        i = bisect_right(self.points, (num_tokens, math.inf))
        (rows_a, a), (rows_b, b) = self.points[i - 1], self.points[i]
        return num_elements * (a + (b - a) * (num_tokens - rows_a) / (rows_b - rows_a))

    def best_of(self, other: ProductRate) -> ProductRate:
        """The shorter time at each number of rows that both have: of two measurements, the less disturbed."""
        theirs = dict(other.points)
        return ProductRate(tuple((rows, min(s, theirs[rows])) for rows, s in self.points if rows in theirs))


@dataclass(frozen=True, slots=True)
class LayoutRates:
    """Products with one type's weights. `repacked` is None where the device has no such kernel. `…_start` is what a
    product takes besides, whatever its size, by rows; None: nothing, as in a roofline.
    """

    plain: ProductRate
    repacked: ProductRate | None = None
    plain_start: ProductRate | None = None
    repacked_start: ProductRate | None = None

    def seconds(self, num_elements: float, num_tokens: int, is_repacked: bool = False) -> float:
        """Of one matrix with `num_tokens` rows. A layout without a kernel takes the plain one."""
        rate, start = self.plain, self.plain_start
        if is_repacked and self.repacked is not None:
            rate, start = self.repacked, self.repacked_start
        return rate.seconds(num_elements, num_tokens) + (start.seconds(1, num_tokens) if start is not None else 0.0)


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A way bytes take. `latency_s` passes before the first byte of a request; `chunk_bytes` and `depth` say how it was
    used: bytes of a request, requests in flight. Raises MalformedProfile.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    chunk_bytes: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        _positive("bytes_per_s", self.bytes_per_s)
        _not_negative("latency_s", self.latency_s)
        for name, count in (("chunk_bytes", self.chunk_bytes), ("depth", self.depth)):
            if count is not None:
                _positive(name, count)

    def seconds(self, num_bytes: float) -> float:
        """Of one transfer; its requests follow each other without a gap."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class RepackProfile:
    """Turning one type's rows into the repacked layout: `bytes_per_s` of one worker between two places in RAM,
    `read_bytes_per_s` of the drive while all its workers repack what they read, with compute at rest.
    """

    bytes_per_s: float
    read_bytes_per_s: float

    def __post_init__(self) -> None:
        _positive("bytes_per_s", self.bytes_per_s)
        _positive("read_bytes_per_s", self.read_bytes_per_s)


@dataclass(frozen=True, slots=True)
class SharedUse:
    """Computing one row with `num_threads` while the drive is read: what is left of each, as a share of what it gives
    alone, computing alone with all threads. Raises MalformedProfile.
    """

    num_threads: int
    compute_share: float
    read_share: float

    def __post_init__(self) -> None:
        for name in ("num_threads", "compute_share", "read_share"):
            _positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class WeightWork:
    """One matrix of a stage: its elements are multiplied with every token's row."""

    type: TensorType
    num_elements: int
    is_repacked: bool = False


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a stage computes, for any number of tokens and positions.

    `activations_per_token`: elements that go into and come out of its products, summed over the products.
    `cache_per_position`: for an attention stage the type of keys and of values, each with num_q_heads * head_dim
    elements (a head's row is read once by every query head that shares it); empty otherwise.
    """

    weights: tuple[WeightWork, ...]
    activations_per_token: int
    cache_per_position: tuple[tuple[TensorType, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """A device that computes. Raises MalformedProfile.

    `products` by the name of the weights' type. `attention` by the name of the cache's type: seconds per element of K
    or V that a query row sees, by query rows. `stage_overhead_s` is what the ops of a stage take however small they
    are, its products not counted, `graph_start_s` what starting a graph takes, `activation_s_per_element` what norms,
    rope, SwiGLU and sums take per element of StageWork.activations_per_token. `memory_bytes`: of the device, RAM for
    the CPU.
    """

    name: str
    is_cpu: bool
    num_threads: int
    memory_bytes: int
    products: Mapping[str, LayoutRates]
    attention: Mapping[str, ProductRate]
    activation_s_per_element: float
    stage_overhead_s: float
    graph_start_s: float
    from_host: LinkProfile | None = None
    to_host: LinkProfile | None = None

    def __post_init__(self) -> None:
        _positive("num_threads", self.num_threads)
        _positive("memory_bytes", self.memory_bytes)
        _check_types("products", self.products)
        _check_types("attention", self.attention)
        for name in ("activation_s_per_element", "stage_overhead_s", "graph_start_s"):
            _not_negative(name, getattr(self, name))
        for name, link in (("from_host", self.from_host), ("to_host", self.to_host)):
            wanted = "null for the CPU" if self.is_cpu else "a link, for a device that is not the CPU"
            _require((link is None) is self.is_cpu, name, wanted, link)

    def product_s(self, weight: WeightWork, num_tokens: int) -> float:
        """A type that was not measured takes the time of the measured type nearest in bits per element."""
        rates = _nearest(self.products, weight.type)
        return rates.seconds(weight.num_elements, num_tokens, weight.is_repacked)

    def attention_s(self, work: StageWork, num_tokens: int, num_positions: float) -> float:
        """`num_positions`: those a query row sees, on average over the rows. Falls back as `product_s` does."""
        return sum(
            _nearest(self.attention, type_).seconds(num_elements * num_positions, num_tokens)
            for type_, num_elements in work.cache_per_position
        )

    def stage_s(self, work: StageWork, num_tokens: int, num_positions: float = 0) -> float:
        """A stage as one of several in a graph; `graph_start_s` comes on top where it is a graph of its own."""
        products_s = sum(self.product_s(weight, num_tokens) for weight in work.weights)
        activations_s = work.activations_per_token * num_tokens * self.activation_s_per_element
        return self.stage_overhead_s + products_s + activations_s + self.attention_s(work, num_tokens, num_positions)


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """A machine. `source` says where the figures come from; `libggml` is its version and provider, or "" where the
    figures are not from it. `drive` is the way pipo takes, `drive_ways` are all that were measured. `repack` is by
    type. `devices[0]` is the CPU, the only one. `shared_uses`: by number of threads; where there are none, the CPU and
    the drive do not disturb each other. Raises MalformedProfile.
    """

    name: str
    source: str
    libggml: str
    num_cores: int
    ram_bytes: int
    drive: LinkProfile
    ram_copy: LinkProfile
    devices: tuple[ComputeProfile, ...]
    repack: Mapping[str, RepackProfile] = field(default_factory=dict)
    drive_ways: tuple[LinkProfile, ...] = ()
    shared_uses: tuple[SharedUse, ...] = ()

    def __post_init__(self) -> None:
        _positive("num_cores", self.num_cores)
        _positive("ram_bytes", self.ram_bytes)
        _require(bool(self.devices), "devices", "the CPU at least", self.devices)
        for i, device in enumerate(self.devices):
            _require(device.is_cpu is (i == 0), f"devices[{i}].is_cpu", "the CPU first, and no other", device.is_cpu)
        if self.repack:
            _check_types("repack", self.repack)

    @property
    def cpu(self) -> ComputeProfile:
        return self.devices[0]

    def shared_use(self, num_threads: int | None) -> SharedUse | None:
        """With so many threads, all of them where None is said."""
        wanted = num_threads or self.cpu.num_threads
        return next((use for use in self.shared_uses if use.num_threads == wanted), None)

    def unit_read_s(self, num_bytes: float, repacked_as: TensorType | None = None) -> float:
        """From the drive into RAM, repacked on the way where a type is named and has a kernel here."""
        if repacked_as is None or not self.repack:
            return self.drive.seconds(num_bytes)
        rate = _nearest(self.repack, repacked_as).read_bytes_per_s
        return self.drive.latency_s + num_bytes / min(rate, self.drive.bytes_per_s)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> MachineProfile:
        """What `to_json` wrote. Raises MalformedProfile naming the key, what it must be and what was found."""
        return decode(cls, parse(text))


def _nearest(rates: Mapping[str, T], type_: TensorType) -> T:
    """Those of the type, else of the type whose elements have the nearest number of bits."""
    if type_.name in rates:
        return rates[type_.name]
    return rates[min(sorted(rates), key=lambda name: abs(_bits(TensorType[name]) - _bits(type_)))]


def _bits(type_: TensorType) -> float:
    return type_.block_bytes * 8 / type_.block_elems


def _check_types(key: str, rates: Mapping[str, object]) -> None:
    _require(bool(rates), key, "one type at least", "none")
    for name in rates:
        _require(name in TensorType.__members__, key, "names of tensor types", name)


def _positive(key: str, figure: float) -> None:
    _require(figure > 0, key, "more than zero", figure)
    _require(1 / _BEYOND < figure < _BEYOND, key, "between 1e-30 and 1e30", figure)


def _not_negative(key: str, figure: float) -> None:
    _require(figure >= 0, key, "zero or more", figure)
    _require(figure < _BEYOND, key, "below 1e30", figure)


def _require(is_met: bool, key: str, wanted: str, found: object) -> None:
    if not is_met:
        raise MalformedProfile(key, wanted, found)
