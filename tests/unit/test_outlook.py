"""Plans for machines that are not here: what is measured of this one, and what limits them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.random_model import write_random_model
from pipo.base.adapter import AdapterChoice
from pipo.base.config import EngineConfig
from pipo.base.machine import LayoutRates, SharedUse
from pipo.cli.report import plan_rows
from pipo.hardware import host, profiles
from pipo.model_file import ModelFile
from pipo.outlook import Outlook
from pipo.plan import Plan, _soonest, _stall_share
from pipo.plan_facts import homed_plan_dict
from pipo.planner.predict import Prediction, Workload
from pipo.planner.simulate import Forecast, Lane
from pipo.planner.variations import with_compute, with_drive, with_link
from tests.support.header_only import LLAMA_7B, write_header
from tests.support.random_adapters import write_random_adapter

LAPTOP = profiles.load("rtx3060-laptop")
REQUEST = Workload(64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return ModelFile(write_header(tmp_path_factory.mktemp("header"), LLAMA_7B), header_only=True)


@pytest.fixture
def outlook(model: ModelFile) -> Iterator[Outlook]:
    with Outlook(model, EngineConfig()) as opened:
        yield opened


def test_another_machine_measures_nothing_of_this_one(outlook: Outlook, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("this machine was asked")

    for name in ("drive_rates", "ram_bytes", "vram_bytes"):
        monkeypatch.setattr(host, name, fail)
    case = outlook.case_elsewhere(LAPTOP, None, None, REQUEST, 128)
    assert (case.ram_bytes, case.vram_bytes) == (LAPTOP.ram_bytes, LAPTOP.devices[1].memory_bytes)
    plan = outlook.plan(case)
    assert plan.limit_bytes == LAPTOP.ram_bytes and plan.drive.bytes_per_s == LAPTOP.drive.bytes_per_s


def test_repacked_kernels_are_used_where_the_profile_has_them(outlook: Outlook) -> None:
    rates = LAPTOP.cpu.products["Q4_0"]
    fast = replace(rates, repacked=with_compute(LAPTOP, 0, 3).cpu.products["Q4_0"].plain)
    with_kernels = replace(LAPTOP.cpu, products={**LAPTOP.cpu.products, "Q4_0": fast})
    machines = (LAPTOP, replace(LAPTOP, devices=(with_kernels, *LAPTOP.devices[1:])))
    cases = [outlook.case_elsewhere(each, None, "1GB", REQUEST, 128) for each in machines]
    plain, repacked = (outlook.plan(case) for case in cases)
    assert plain.repacked_types == ()
    if outlook._compute.repack is not None:
        assert repacked.prediction and plain.prediction
        assert repacked.prediction.tokens_per_s >= plain.prediction.tokens_per_s


def test_what_would_help_says_what_binds(outlook: Outlook) -> None:
    case = outlook.case_elsewhere(LAPTOP, "1GB", "500MB", REQUEST, 128)
    changes = outlook.what_would_help(case, outlook.plan(case))
    assert [each.gain for each in changes] == sorted((each.gain for each in changes), reverse=True)
    gain = {each.what: each.gain for each in changes}
    assert gain["a drive twice as fast"] > 0.7 > gain["a CPU twice as fast"]


def test_a_part_that_is_faster_leaves_the_others_alone() -> None:
    rate = LAPTOP.cpu.products["Q4_0"]
    assert with_drive(LAPTOP, 2).unit_read_s(1e9) == pytest.approx(LAPTOP.unit_read_s(1e9) / 2)
    assert with_drive(LAPTOP, 2).devices == LAPTOP.devices
    faster: LayoutRates = with_compute(LAPTOP, 0, 2).cpu.products["Q4_0"]
    assert faster.seconds(1e6, 5) == pytest.approx(rate.seconds(1e6, 5) / 2)
    linked = with_link(LAPTOP, 2).devices[1]
    assert linked.from_host and LAPTOP.devices[1].from_host
    assert linked.from_host.bytes_per_s == 2 * LAPTOP.devices[1].from_host.bytes_per_s
    assert linked.products == LAPTOP.devices[1].products


def test_a_batch_takes_memory_for_each_of_its_sequences(outlook: Outlook) -> None:
    one, four = (
        outlook.plan(outlook.case_elsewhere(LAPTOP, None, None, replace(REQUEST, num_sequences=n), 512)) for n in (1, 4)
    )
    kv = [sum(each.values()) for each in (_kv(one), _kv(four))]
    assert kv[1] == pytest.approx(4 * kv[0], rel=0.01)


def test_keys_and_values_of_many_sequences_take_turns_on_a_small_device(model: ModelFile, outlook: Outlook) -> None:
    """Two slots for all of them would be as large as the device."""
    work = Workload(768, 256, 64)
    plan = outlook.plan(outlook.case_elsewhere(LAPTOP, "64GB", "2GB", work, 1024))
    assert plan.device is not None and plan.device.placement.is_all
    at_a_time = plan.device.placement.kv_sequences
    assert 0 < at_a_time < 64 and plan.device.placement.num_bytes <= plan.device.limit_bytes
    assert f"keys and values move for {at_a_time} of 64 sequences at a time" in dict(plan_rows(plan))["device"]
    device = homed_plan_dict(model, plan)["device"]
    assert isinstance(device, dict) and device["kv_sequences_at_a_time"] == at_a_time


def _kv(plan: Plan) -> dict[str, int]:
    ram = plan.placement.breakdown["KV cache"]
    share = plan.device.placement if plan.device else None
    return {"ram": ram, "device": share.kv_bytes if share else 0}


@pytest.mark.parametrize(("threads", "expected"), [(None, 7), (8, None)])
def test_decode_leaves_a_core_to_the_drive_where_nobody_said_how_many(
    model: ModelFile, threads: int | None, expected: int | None
) -> None:
    uses = (SharedUse(8, 0.9, 0.5), SharedUse(7, 0.9, 1.0))
    machine = replace(LAPTOP, shared_uses=uses, devices=(replace(LAPTOP.cpu, num_threads=8),))
    with Outlook(model, EngineConfig(threads=threads)) as opened:
        plans = [opened.plan(opened.case_elsewhere(machine, ram, None, REQUEST, 128)) for ram in ("2GB", "12GB")]
    assert [plan.decode_threads for plan in plans] == [expected, None], "with all in RAM the drive is not in the way"


def test_where_plans_are_alike_the_steadier_one_is_taken(outlook: Outlook) -> None:
    plan = outlook.plan(outlook.case_elsewhere(LAPTOP, "2GB", None, REQUEST, 128))

    def predicted(seconds: float, stall_share: float) -> Plan:
        decode = Forecast(seconds, {Lane.DRIVE: seconds * (1 - stall_share)})
        return replace(plan, prediction=Prediction(0.0, decode, REQUEST))

    slow, tied, soonest = predicted(1.05, 0.0), predicted(1.005, 0.0), predicted(1.0, 0.05)
    assert _soonest([slow, tied, soonest]) == [soonest, tied]
    assert min(_soonest([soonest, slow, tied]), key=_stall_share) is tied
    assert min(_soonest([tied, predicted(1.005, 0.005)]), key=_stall_share) is tied, "less than can be told is no stall"


def test_adapters_are_counted_and_take_time(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model.gguf", "smoke", "q4_0")
    style = write_random_adapter(tmp_path / "model.gguf", tmp_path / "style.gguf", rank=64)
    model, plans = ModelFile(tmp_path / "model.gguf", header_only=True), []
    for lora in ((), (AdapterChoice(style),), (AdapterChoice(style, 0.5),) * 2):
        with Outlook(model, EngineConfig(lora=lora)) as opened:
            plans.append(opened.plan(opened.case_elsewhere(LAPTOP, None, None, REQUEST, 128)))
    sizes = [plan.placement.breakdown.get("adapters", 0) for plan in plans]
    assert sizes[0] == 0 and sizes[1] > style.stat().st_size * 0.95 and sizes[2] == 2 * sizes[1]
    assert [[named.id for named in plan.adapters] for plan in plans] == [[], ["style"], ["style", "style-2"]]
    seconds = [plan.prediction.total_s for plan in plans if plan.prediction]
    assert seconds == sorted(seconds) and seconds[0] < seconds[1] < seconds[2]
