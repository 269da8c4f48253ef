"""planner.batch and its pictures: plateau, knee, and what ends the gain."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.cli.curve import advice, as_dict, picture, plot_lines
from pipo.planner.batch import NEAR, BatchCurve, BatchPoint, Ending, batch_point, busiest
from pipo.planner.predict import Workload, decode_load, predict
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane
from tests.support.planned import Sizes, all_on_device, placed

ROOMY = 1 << 40


def point(num: int, rate: float, lane: Lane = Lane.DEVICE, kv_share: float = 0.0) -> BatchPoint:
    return BatchPoint(num, rate, 1.0, num / rate, num << 20, 0, lane, kv_share)


def curve(*rates: float, lane: Lane = Lane.DEVICE, kv_share: float = 0.0) -> BatchCurve:
    return BatchCurve([point(1 << i, rate, lane, kv_share) for i, rate in enumerate(rates)])


def predicted(num_sequences: int, sizes: Sizes, prompt_tokens: int) -> BatchPoint:
    workload = Workload(prompt_tokens, 100, num_sequences)
    here = placed(sizes, ROOMY, all_on_device(sizes))
    return batch_point(here, predict(here, workload, SCHEDULES["pipelined"]), decode_load(workload))


def test_the_knee_is_the_smallest_batch_near_the_plateau() -> None:
    found = curve(10, 20, 39, 40, 40.5)
    assert found.plateau == 40.5
    assert found.knee.num_sequences == 4


@pytest.mark.parametrize(
    ("found", "ending"),
    [
        (curve(10, 20, 40), Ending.MEMORY),
        (curve(10), Ending.MEMORY),
        (curve(10, 20, 20), Ending.COMPUTE),
        (curve(10, 20, 20, kv_share=0.8), Ending.KV_TRAFFIC),
        (curve(10, 20, 20, lane=Lane.DRIVE), Ending.WEIGHTS),
        (curve(10, 20, 20, lane=Lane.UPLOAD), Ending.WEIGHTS),
        (curve(10, 20, 20, lane=Lane.UPLOAD, kv_share=0.9), Ending.KV_TRAFFIC),
        (BatchCurve([point(1, 10), point(2, 20), point(4, 5, Lane.CPU)]), Ending.WEIGHTS),
    ],
)
def test_what_ends_the_gain(found: BatchCurve, ending: Ending) -> None:
    assert found.ending is ending


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=13))
def test_every_curve_has_a_knee_a_plot_and_a_picture(rates: list[float]) -> None:
    found = curve(*rates)
    assert found.knee.tokens_per_s >= NEAR * max(rates)
    assert all(p.tokens_per_s < NEAR * max(rates) for p in found.points if p.num_sequences < found.knee.num_sequences)
    lines = list(plot_lines(found))
    assert len(lines) + len(list(advice(found))) <= 20 and sum("◀" in line for line in lines) == 1
    drawn = ElementTree.fromstring(picture(found, "a < b & c", "'quoted'"))
    tags = [each.tag.split("}")[1] for each in drawn.iter()]
    assert tags.count("polyline") == 1 and tags.count("circle") == len(rates) + 1
    assert as_dict(found)["best_num_sequences"] == found.knee.num_sequences


def test_keys_and_values_of_many_long_sequences_outweigh_weights() -> None:
    few, many = (predicted(num, Sizes(), prompt_tokens=4000) for num in (1, 64))
    assert few.lane is many.lane is Lane.DEVICE
    assert few.kv_share < many.kv_share and many.kv_share > 0.5
    assert many.tokens_per_s > few.tokens_per_s


def test_keys_and_values_that_move_are_the_link_s_share() -> None:
    sizes = Sizes()
    here = placed(sizes, ROOMY, all_on_device(sizes, num_streamed=1, moves_kv=True))
    workload = Workload(4000, 100, 64)
    prediction = predict(here, workload, SCHEDULES["pipelined"])
    assert busiest(prediction) is Lane.UPLOAD
    assert batch_point(here, prediction, decode_load(workload)).kv_share > 0.9
