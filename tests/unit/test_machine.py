"""base.machine: figures of a machine, checked where they are made, and read strictly from JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipo.base.errors import MalformedProfile
from pipo.base.machine import (
    ComputeProfile,
    LayoutRates,
    LinkProfile,
    MachineProfile,
    ProductRate,
    RepackProfile,
    StageWork,
    WeightWork,
)
from pipo.base.tensor_type import TensorType
from tests.support.machines import GPU, MACHINE


def test_json_there_and_back() -> None:
    both = replace(MACHINE, devices=(*MACHINE.devices, GPU))
    assert MachineProfile.from_json(both.to_json()) == both
    assert MachineProfile.from_json(both.to_json().encode()) == both


def test_what_may_be_left_out() -> None:
    fields = json.loads(MACHINE.to_json())
    del fields["repack"], fields["drive_ways"], fields["drive"]["latency_s"], fields["drive"]["depth"]
    read = MachineProfile.from_json(json.dumps(fields))
    assert (read.repack, read.drive_ways, read.drive.latency_s, read.drive.depth) == ({}, (), 0.0, None)


def _at(fields: Any, *path: str | int) -> Any:
    for key in path:
        fields = fields[key]
    return fields


_CPU = ("devices", 0)
_POINTS = (*_CPU, "products", "Q4_0", "plain", "points")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("ram_bytes",), 0, "ram_bytes must be more than zero, found 0"),
        (("ram_bytes",), -1, "ram_bytes"),
        (("ram_bytes",), 1.5, "ram_bytes must be a whole number"),
        (("ram_bytes",), True, "ram_bytes must be a whole number"),
        (("name",), 7, "name must be a text"),
        (("drive", "bytes_per_s"), 0, "drive.bytes_per_s must be more than zero"),
        (("drive", "bytes_per_s"), "fast", "drive.bytes_per_s must be a number, found 'fast'"),
        (("drive", "bytes_per_s"), None, "drive.bytes_per_s must be a number"),
        (("drive", "bytes_per_s"), 10**400, "drive.bytes_per_s must be a finite number"),
        (("drive", "latency_s"), -0.1, "drive.latency_s must be zero or more"),
        (("drive", "depth"), 0, "drive.depth"),
        (("drive",), [], "drive must be a table"),
        (("drive", "speed"), 1, "drive.speed must be one of bytes_per_s"),
        (("devices",), [], "devices must be the CPU at least"),
        (("devices",), {}, "devices must be a list"),
        ((*_CPU, "is_cpu"), 1, "devices[0].is_cpu must be true or false"),
        ((*_CPU, "from_host"), {"bytes_per_s": 1.0}, "devices[0].from_host must be null for the CPU"),
        ((*_CPU, "products"), {}, "devices[0].products must be one type at least"),
        ((*_CPU, "products", "Q9"), {"plain": {"points": [[1, 1.0]]}}, "devices[0].products must be names of tensor"),
        ((*_CPU, "graph_start_s"), -1.0, "devices[0].graph_start_s must be zero or more"),
        (_POINTS, [], "Q4_0.plain.points must be a first point of 1 row"),
        (_POINTS, [[2, 1.0]], "Q4_0.plain.points must be a first point of 1 row"),
        (_POINTS, [[1, 1.0], [1, 2.0]], "points[1][0] must be more rows than 1, found 1"),
        (_POINTS, [[1, 0.0]], "devices[0].products.Q4_0.plain.points[0][1] must be more than zero"),
        (_POINTS, [[1, 1.0, 1.0]], "points[0] must be a list of 2"),
        (("repack", "Q4_0", "bytes_per_s"), 0.0, "repack.Q4_0.bytes_per_s"),
    ],
)
def test_a_bad_figure_is_named(path: tuple[str | int, ...], value: object, named: str) -> None:
    fields = json.loads(MACHINE.to_json())
    _at(fields, *path[:-1])[path[-1]] = value
    with pytest.raises(MalformedProfile) as caught:
        MachineProfile.from_json(json.dumps(fields))
    assert named in caught.value.message
    assert caught.value.hint


def test_a_missing_figure_is_named() -> None:
    fields = json.loads(MACHINE.to_json())
    del fields["ram_copy"]["bytes_per_s"]
    with pytest.raises(MalformedProfile, match=r"ram_copy\.bytes_per_s must be float, found 'nothing'"):
        MachineProfile.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "NaN", '{"name": NaN}', '{"name": "a", "name": "b"}', b"\xff\xfe\xff", "[" * 100_000]
)
def test_what_is_no_profile(text: str | bytes) -> None:
    with pytest.raises(MalformedProfile):
        MachineProfile.from_json(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinkProfile(0.0),
        lambda: LinkProfile(float("nan")),
        lambda: LinkProfile(float("inf")),
        lambda: LinkProfile(1.0, latency_s=-1.0),
        lambda: RepackProfile(1.0, 0.0),
        lambda: ProductRate(()),
        lambda: ProductRate.roofline(0.5, 1e9, 0.0),
        lambda: replace(MACHINE, devices=(MACHINE.cpu, MACHINE.cpu)),
        lambda: replace(MACHINE, devices=(GPU,)),
        lambda: replace(GPU, to_host=None),
    ],
)
def test_figures_are_checked_where_they_are_made(make: Callable[[], object]) -> None:
    with pytest.raises(MalformedProfile):
        make()


def test_a_type_that_was_not_measured_takes_the_nearest() -> None:
    rates = {name: LayoutRates(ProductRate(((1, s),))) for name, s in (("Q4_0", 1.0), ("Q8_0", 2.0), ("F16", 4.0))}
    cpu = replace(MACHINE.cpu, products=rates)
    near = {
        TensorType.Q4_K: 1.0,
        TensorType.Q5_K: 1.0,
        TensorType.IQ1_S: 1.0,
        TensorType.Q6_K: 2.0,
        TensorType.F32: 4.0,
    }
    assert {type_: cpu.product_s(WeightWork(type_, 1), 1) for type_ in near} == near


def test_a_layout_without_a_kernel_takes_the_plain_one() -> None:
    cpu = replace(MACHINE.cpu, products={"Q4_0": LayoutRates(ProductRate(((1, 3.0),)))})
    assert cpu.product_s(WeightWork(TensorType.Q4_0, 2, is_repacked=True), 1) == 6.0


def test_a_product_takes_its_start_besides_its_elements() -> None:
    one, start = ProductRate(((1, 2.0),)), ProductRate(((1, 0.5),))
    rates = LayoutRates(one, repacked=one, repacked_start=start)
    assert rates.seconds(10, 2) == 40.0
    assert rates.seconds(10, 2, is_repacked=True) == 41.0
    assert replace(rates, repacked=None, plain_start=start).seconds(10, 1, is_repacked=True) == 20.5


def test_a_stage_is_the_sum_of_its_parts() -> None:
    cpu = ComputeProfile(
        "CPU", True, 2, 1 << 30,
        {"Q4_0": LayoutRates(ProductRate(((1, 1.0), (3, 5.0))))},
        {"F16": ProductRate(((1, 0.5),))},
        activation_s_per_element=0.25, stage_overhead_s=100.0, graph_start_s=7.0,
    )  # fmt: skip
    work = StageWork((WeightWork(TensorType.Q4_0, 10), WeightWork(TensorType.Q4_0, 5)), 8, ((TensorType.F16, 4),) * 2)
    assert cpu.stage_s(work, num_tokens=2, num_positions=6) == 100 + 15 * 3 + 8 * 2 * 0.25 + 2 * 4 * 6 * 0.5 * 2


def test_seconds_of_a_link() -> None:
    assert LinkProfile(100.0, 0.5).seconds(50) == 1.0
    assert MACHINE.unit_read_s(4e9) == MACHINE.drive.latency_s + 1.0
    assert MACHINE.unit_read_s(4e9, TensorType.Q4_0) == MACHINE.drive.latency_s + 2.0
    assert replace(MACHINE, repack={}).unit_read_s(4e9, TensorType.Q4_0) == MACHINE.unit_read_s(4e9)
