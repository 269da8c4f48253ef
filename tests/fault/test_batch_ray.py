"""A batch job over Ray: two workers on this machine, and one of them dies."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.base.errors import PipoError, UsageError
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.jobs.batch import OPEN_PER_SEQUENCE, Batch
from pipo.jobs.engine_plan import EngineSpec
from pipo.jobs.prompts import PromptSettings
from pipo.jobs.ray_engines import RayEngines, RayPlace
from pipo.planner.predict import Workload
from pipo.serving.contract import EngineClient, Summary
from tests.support.batches import settings_of
from tests.support.command_line import TIMEOUT_S, CommandLine

if sys.version_info >= (3, 15):  # for which there is none yet, as pyproject.toml has it
    pytest.importorskip("ray")

NUM_ROWS = 40
PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With an environment that Ray's processes inherit."""
    path = tmp_path / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2] / "src"), str(Path.cwd())]))
    return path


def _run(model: Path, table: Path, output: Path) -> None:
    config = EngineConfig(ram="400MB", threads=1, context_tokens=80)
    settings = settings_of(
        model, table, output, config=config, prompts=PromptSettings(PARAMS, is_raw=True), num_sequences=2
    )

    async def start(spec: EngineSpec) -> EngineClient:
        own = EngineSpec(spec.model, config, spec.context_tokens, spec.workload)
        engines = await RayEngines.start(RayPlace("local", 2), own, 2)
        assert engines.info.num_sequences == 4
        return engines

    with Batch(settings) as job:
        asyncio.run(job.run(start, lambda client: None, lambda tally, stats, num_bytes: None, is_elsewhere=True))
        assert job.tally.num_done == NUM_ROWS and not job.tally.num_failed
        job.publish()


class _Death:
    """Of the first worker and its engine, as soon as any row is answered: then it has others open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes: list[psutil.Process] = []
        self.num_lost = 0
        stream, lose = RayEngines.stream, RayEngines._lose

        async def deadly(engines: RayEngines, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
            async for piece in stream(engines, request):
                if not self.processes:
                    worker = psutil.Process(engines.process_ids[0])
                    self.processes = [worker, *worker.children(recursive=True)]
                    worker.kill()
                yield piece

        def counted(engines: RayEngines, worker: Any) -> None:
            self.num_lost += 1
            lose(engines, worker)

        monkeypatch.setattr(RayEngines, "stream", deadly)
        monkeypatch.setattr(RayEngines, "_lose", counted)


@pytest.mark.parametrize(
    ("address", "says"), [("127.0.0.1:9", "no cluster answers"), ("ray://x:1", "no address"), ("x", "no address")]
)
def test_an_address_where_no_cluster_is_says_so_at_once(address: str, says: str) -> None:
    spec = EngineSpec(Path("none"), EngineConfig(), 1, Workload(1, 1))
    with pytest.raises(PipoError, match=says):
        asyncio.run(RayEngines.start(RayPlace(address), spec, 1))


def test_without_ray_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = EngineSpec(Path("none"), EngineConfig(), 1, Workload(1, 1))
    with pytest.raises(UsageError) as caught:
        asyncio.run(RayEngines.start(RayPlace("local"), spec, 1))
    assert "pipo[ray]" in (caught.value.hint or "")


def test_a_worker_that_dies_costs_only_the_rows_it_had_open(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "in.csv"
    table.write_text("prompt\n" + "".join(f"row {'x' * (i % 4)} {i}\n" for i in range(NUM_ROWS)))
    _run(model, table, tmp_path / "calm.csv")
    death = _Death(monkeypatch)
    _run(model, table, tmp_path / "rough.csv")
    assert 0 < death.num_lost <= OPEN_PER_SEQUENCE * 4
    assert len(death.processes) > 1 and not psutil.wait_procs(death.processes, TIMEOUT_S)[1]
    assert (tmp_path / "rough.csv").read_bytes() == (tmp_path / "calm.csv").read_bytes()
    assert (tmp_path / "calm.csv").read_text().count(",length,") == NUM_ROWS


def test_the_command_answers_as_it_does_here(model: Path, tmp_path: Path) -> None:
    """And nothing but events is on stdout."""
    command, table = CommandLine.in_folder(tmp_path / "pipo", model), tmp_path / "in.csv"
    table.write_text("prompt\n" + "".join(f"row {i}\n" for i in range(6)) + '""\n')
    flags = ("--raw", "--temp", "0", "-n", "8", "--ignore-eos", "--ram", "400MB", "--num-sequences", "2", "--json")
    for name, more in (("here.csv", ()), ("there.csv", ("--ray", "local", "--ray-workers", "2"))):
        ended = command("batch", str(model), str(table), "-o", str(tmp_path / name), *flags, *more)
        assert ended.code == 3 and "1 of 7 rows have an error; the first: the prompt is empty" in ended.err, ended.err
        events = [json.loads(line) for line in ended.out.splitlines()]
        assert events[-1]["event"] == "end" and events[-1]["num_done"] == 7
    assert "4 at a time" in ended.err and "for the engines of all nodes" in ended.err
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
