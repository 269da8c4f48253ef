"""Keys and values of a part of the sequences at a time on a device: the answers are those of the pass in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.random_model import SHAPES
from pipo.base.adapter import AdapterId
from pipo.base.errors import Cancelled, ComputeError
from pipo.compute.device import ComputeDevice, DeviceBuffer
from pipo.compute.device_backend import DeviceBackend
from pipo.pipeline.forward import Forward
from pipo.planner.device_placement import DevicePlacement, place_on_device
from pipo.planner.placement import place, smallest_bytes
from tests.gpu.test_device_engine import relative_error, split
from tests.support.random_adapters import write_random_adapter
from tests.support.rigs import FloatArray, Rig, float_rig, read_prompts
from tests.support.served import random_requests, serve

CHUNK, ROOMY, NUM, NUM_NEW = 16, 1 << 30, 6, 4
PROMPTS = [list(range(5 + 9 * i, 5 + 9 * i + length)) for i, length in enumerate((40, 3, 17, 1, 22, 9))]
BOUND = 16 * 2**-11  # F16 weights on both sides, in parts of other sizes


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with float_rig(tmp_path_factory.mktemp("device"), CHUNK, NUM) as rig:
        yield rig


@pytest.fixture(scope="module")
def in_one_piece(rig: Rig, device: ComputeDevice) -> FloatArray:
    return answered(rig, device, placement(rig, device, NUM))


@pytest.fixture(scope="module")
def in_three(rig: Rig, device: ComputeDevice) -> FloatArray:
    return answered(rig, device, placement(rig, device, 2))


def placement(
    rig: Rig, device: ComputeDevice, at_a_time: int, *, num_streamed: int = 2, num_on_cpu: int = 0
) -> DevicePlacement:
    """Some blocks pass through the device, and so do keys and values of so many sequences."""
    demand = rig.device_demand(device, ROOMY, CHUNK)
    return split(demand, num_streamed, num_on_cpu, moves_kv=True, at_a_time=at_a_time)


def greedy(forward: Forward) -> FloatArray:
    """Logits after every prompt and of what each sequence goes on with. Shape: (1 + NUM_NEW, prompts, vocab)."""
    rows = [read_prompts(forward, PROMPTS, CHUNK)]
    for i in range(NUM_NEW):
        tokens = [int(token) for token in rows[-1].argmax(axis=1)]
        rows.append(forward.run_batch(tokens, [len(prompt) + i for prompt in PROMPTS]).copy())
    return np.stack(rows)


def answered(rig: Rig, device: ComputeDevice, wanted: DevicePlacement, schedule: str = "pipelined") -> FloatArray:
    there = rig.on_device(device, wanted)
    tight = place(replace(there.demand(), limit_bytes=smallest_bytes(there.demand())))
    with there.running(tight, schedule=schedule) as forward:
        found = greedy(forward)
        assert device.held_bytes <= wanted.num_bytes
    assert device.held_bytes == 0
    return found


@pytest.mark.parametrize("at_a_time", [3, 2, 1])
def test_parts_answer_as_the_whole(
    rig: Rig, device: ComputeDevice, in_one_piece: FloatArray, in_three: FloatArray, at_a_time: int
) -> None:
    """Token for token; bit for bit where a pass has one sequence, and so one part."""
    got = in_three if at_a_time == 2 else answered(rig, device, placement(rig, device, at_a_time))
    np.testing.assert_array_equal(got.argmax(axis=2), in_one_piece.argmax(axis=2))
    np.testing.assert_array_equal(got[0], in_one_piece[0])
    assert relative_error(got, in_one_piece) < BOUND


@pytest.mark.parametrize(("schedule", "num_streamed"), [("layer", 2), ("sequential", 2), ("pipelined", 4)])
def test_the_same_parts_give_the_same_bits(
    rig: Rig, device: ComputeDevice, in_three: FloatArray, schedule: str, num_streamed: int
) -> None:
    got = answered(rig, device, placement(rig, device, 2, num_streamed=num_streamed), schedule)
    np.testing.assert_array_equal(got, in_three)


@pytest.mark.parametrize("num_on_cpu", [0, 1])
def test_mixed_passes_in_parts(rig: Rig, device: ComputeDevice, num_on_cpu: int) -> None:
    """Sequences that come and go, chunks of prompts beside decode rows, with blocks on the CPU and without."""
    lengths = [(20, 3), (2, 5), (9, 2), (30, 3), (1, 4), (12, 6), (3, 3), (25, 2)]
    requests = random_requests(SHAPES["smoke"].vocab_size, lengths, [{}])
    found = []
    for at_a_time in (NUM, 2):
        there = rig.on_device(device, placement(rig, device, at_a_time, num_on_cpu=num_on_cpu))
        with there.running(place(there.demand(1 << 50))) as forward:
            served = serve(forward, requests, seed=1)
        assert served.num_mixed > 2 and served.num_with_holes > 2
        found.append([np.stack(served.logits[i]) for i in range(len(requests))])
    for whole, parts in zip(*found, strict=True):
        assert relative_error(parts, whole) < BOUND
        np.testing.assert_array_equal(parts.argmax(axis=1), whole.argmax(axis=1))


def test_each_sequence_has_its_adapters(rig: Rig, device: ComputeDevice, tmp_path: Path) -> None:
    file = write_random_adapter(rig.blueprint.manifest.files[0], tmp_path / "a.gguf", rank=4, strength=0.5, seed=3)
    adapted, name = rig.with_adapters(file), AdapterId("a")
    found = []
    for weights in ([{name: 0.5 * i} for i in range(NUM)], [{}] * NUM):
        for at_a_time in (NUM, 2):
            there = adapted.on_device(device, placement(adapted, device, at_a_time))
            with there.running(place(there.demand(1 << 50))) as forward:
                forward.use_adapters(weights)
                found.append(greedy(forward)[:2])
    whole, parts, plain, _ = found
    assert relative_error(parts, whole) < 2 * BOUND
    assert relative_error(plain, whole) > 8 * BOUND


def test_what_was_too_small_for_all_computes_there(rig: Rig, device: ComputeDevice) -> None:
    """Less than two slots for keys and values of all sequences: nothing fitted, now all blocks do."""
    roomy = rig.device_demand(device, ROOMY, CHUNK)
    least = min((each for each in place_on_device(roomy) if each.is_all), key=lambda each: each.num_bytes)
    limit = least.num_bytes - roomy.kv_bytes[NUM]
    demand = replace(roomy, limit_bytes=limit)
    assert not any(each.is_all for each in place_on_device(replace(demand, kv_bytes={NUM: roomy.kv_bytes[NUM]})))
    found = next(each for each in place_on_device(demand) if each.is_all)
    assert found.kv_sequences < NUM and found.num_bytes <= limit
    answered(rig, device, found)


@pytest.mark.parametrize("nth", [5, 14])
def test_cancelled_in_mid_pass(
    rig: Rig, device: ComputeDevice, in_three: FloatArray, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Also between two micro-batches of a stage; the same pass then gives what it would have given."""
    there = rig.on_device(device, placement(rig, device, 2))
    with there.running(place(there.demand(1 << 50))) as forward:
        first = read_prompts(forward, PROMPTS, CHUNK)
        tokens, starts = [int(token) for token in first.argmax(axis=1)], [len(prompt) for prompt in PROMPTS]
        with monkeypatch.context() as patch:
            fail_at(patch, DeviceBackend, "compute", nth, Cancelled("enough"))
            with pytest.raises(Cancelled, match="enough"):
                forward.run_batch(tokens, starts)
        np.testing.assert_array_equal(forward.run_batch(tokens, starts), in_three[1])
    assert device.held_bytes == 0


@pytest.mark.parametrize(("way", "nth"), [("upload", 90), ("upload", 140), ("download", 30), ("download", 140)])
def test_nth_copy_fails(rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch, way: str, nth: int) -> None:
    """A typed error, all memory back, and the next engine answers."""
    wanted = placement(rig, device, 2)
    with monkeypatch.context() as patch:
        fail_at(patch, DeviceBuffer, way, nth, ComputeError("the device is gone"))
        with pytest.raises(ComputeError, match="the device is gone"):
            answered(rig, device, wanted)
    assert device.held_bytes == 0
    answered(rig, device, wanted)


def fail_at(patch: pytest.MonkeyPatch, owner: type, name: str, nth: int, error: Exception) -> None:
    real, calls = getattr(owner, name), 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error
        return real(*args)

    patch.setattr(owner, name, failing)
