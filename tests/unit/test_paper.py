"""The simulator beside published figures: their sources, the shape of the predictions, and the page that shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.paper import theory
from bench.paper.__main__ import PAGE, PROFILES
from bench.paper.cells import breakdown, flexgen_laptop_job, pipo_job, pipo_rows
from bench.paper.comparison import Comparison, compare
from bench.paper.figures import KINDS, Figures
from bench.paper.machines import NAMES, dequantising, machine
from bench.paper.page import page
from bench.paper.policy import KvHome
from bench.paper.predict import costs, predict
from bench.paper.published import FLEXGEN_CELLS, PIPO_CELLS
from bench.paper.sensitivity import varied
from pipo.base.machine import MachineProfile
from pipo.hardware import profiles
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane

FIGURES = Figures.load()
SHOWN_BESIDE = {"t4-208gb.drive_fitted", "t4-208gb.drive_write"}  # of the drive, but not in a profile
machines = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(FIGURES)


@pytest.mark.parametrize("key", list(FIGURES))
def test_every_figure_says_where_it_comes_from(key: str) -> None:
    figure = FIGURES[key]
    assert figure.value > 0 and figure.unit and figure.kind in KINDS
    assert len(figure.source) > 10


@machines
def test_profiles_load_round_trip_and_are_made_of_the_figures(name: str) -> None:
    profile = profiles.load(name)
    assert profile == machine(name, FIGURES)
    assert MachineProfile.from_json(profile.to_json()) == profile
    assert (PROFILES / f"{name}.json").read_text(encoding="utf-8") == profile.to_json() + "\n"


def test_profiles_are_the_three_machines() -> None:
    assert sorted(profiles.NAMES) == sorted(NAMES)
    assert {path.stem for path in PROFILES.glob("*.json")} == set(NAMES)
    with pytest.raises(KeyError):
        profiles.load("../cache")


@machines
def test_no_figure_of_a_machine_is_idle(name: str) -> None:
    for key in FIGURES:
        if key.startswith(f"{name}.") and key not in SHOWN_BESIDE:
            assert machine(name, FIGURES.scaled(key, 1.5)) != machine(name, FIGURES), key


def test_every_assumption_is_varied() -> None:
    assert {key for key in FIGURES.of_kind("assumed") if not key.startswith("rtx5060-laptop.")} <= set(varied(FIGURES))


def test_both_tables_are_whole() -> None:
    assert len(PIPO_CELLS) == 18 and len(FLEXGEN_CELLS) == 12


def test_a_dequantised_weight_costs_the_same_however_many_rows_use_it() -> None:
    profile = machine("rtx3060-laptop", FIGURES)
    plain = profile.devices[1].products["F16"].plain
    slowed = dequantising(profile, "rtx3060-laptop", FIGURES).devices[1].products["Q4_0"].plain
    extra = [slowed.seconds(1, rows) - plain.seconds(1, rows) for rows in (1, 7, 32, 512, 16384)]
    assert extra == pytest.approx([extra[0]] * len(extra))
    assert extra[0] == pytest.approx(13.0 / (336e9 * 0.7))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_lane_is_busy_for_longer_than_the_run(schedule: str) -> None:
    run = predict(pipo_job(PIPO_CELLS[3], FIGURES), schedule)
    assert run.seconds == pytest.approx(run.prefill.seconds + 31 * run.decode.seconds)
    assert run.tokens_per_s == pytest.approx(32 * 32 / run.seconds)
    assert all(0 <= run.busy(lane) <= 1 + 1e-9 for lane in Lane)
    assert run.device_busy == pytest.approx(run.busy(Lane.DEVICE))


def test_micro_batches_share_a_load_of_the_weights() -> None:
    job = flexgen_laptop_job(PIPO_CELLS[4], FIGURES)
    eight = replace(job, policy=replace(job.policy, num_micro_batches=8))
    (one, _), (many, _) = costs(job, is_prefill=False), costs(eight, is_prefill=False)
    assert many.read == one.read and many.copy == one.copy
    assert many.compute[1] == pytest.approx(8 * one.compute[1])


def test_attention_on_the_cpu_moves_no_keys_and_leaves_the_device_idle() -> None:
    job = flexgen_laptop_job(PIPO_CELLS[4], FIGURES)
    there = replace(job, policy=replace(job.policy, kv=KvHome.RAM, cpu_attention=True))
    step, share = costs(there, is_prefill=False)
    assert not step.kv_load and step.kv_save
    assert 0 < share < 1
    assert costs(there, is_prefill=True)[1] == 1


def test_perfect_pipelines_gain_what_arithmetic_says() -> None:
    assert theory.point(0.0, 1.0).over_layer == pytest.approx(4 / 3)
    assert theory.point(0.5, 1.0).over_layer == pytest.approx(3 / 2)
    assert theory.point(0.0, 1.0).over_sequential == pytest.approx(2) and 2 >= 1.7
    assert [theory.busy(each) for each in (theory.through_ram().sequential, theory.through_ram().pipelined)] == (
        pytest.approx([1 / 3, 1])
    )


@given(st.sampled_from(theory.RESIDENT_SHARES), st.floats(0.02, 50))
@settings(max_examples=25, deadline=None)
def test_the_gain_is_largest_at_balance(resident_share: float, balance: float) -> None:
    best, here = theory.point(resident_share, 1.0), theory.point(resident_share, balance)
    assert 1 - 1e-9 <= here.over_layer <= best.over_layer + 1e-9
    assert here.over_layer <= here.over_sequential + 1e-9 <= best.over_sequential + 1e-6


@pytest.mark.parametrize("balance", [0.01, 100])
def test_nothing_is_gained_where_one_side_dominates(balance: float) -> None:
    assert theory.point(0.0, balance).over_layer == pytest.approx(1)
    assert theory.point(0.0, balance).over_sequential < 1.02


def test_order_gains_most_where_reading_copying_and_computing_are_of_a_size() -> None:
    """In the cells too: out of the page cache more than from the drive, and nothing over a link that never rests."""
    gains = {}
    for cell in PIPO_CELLS:
        steps = breakdown(cell, FIGURES)
        where = "RAM" if not cell.is_on_disk else "drive" if cell.model in ("OPT-66B", "Llama3.1-70B") else "cache"
        gains.setdefault(where, []).append(steps.kernels.tokens_per_s / steps.layer.tokens_per_s)
    assert max(gains["RAM"]) < 1.05
    assert max(gains["RAM"]) < min(gains["drive"]) and max(gains["drive"]) < min(gains["cache"])


def test_pipo_is_never_slower_than_flexgen() -> None:
    assert all(row.ratio > 1 for row in pipo_rows(FIGURES))


def test_the_page_is_up_to_date(found: Comparison) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(found), "run: python -m bench.paper --markdown"
    for name, text in found.pictures.items():
        assert Path(PAGE.parent, name).read_text(encoding="utf-8") == text


def test_pictures_show_the_same_seconds(found: Comparison) -> None:
    drawn = [ElementTree.fromstring(text) for text in found.pictures.values()]
    ticks = [[each.text for each in picture.iter() if (each.text or "").endswith(" ms")] for picture in drawn]
    assert len(drawn) == 2 and ticks[0] == ticks[1]
