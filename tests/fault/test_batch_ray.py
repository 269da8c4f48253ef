"""A batch job over Ray: two workers on this machine, and one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.base.errors import PipoError
from pipo.generation.request import SamplingParams
from pipo.jobs.batch import Batch
from pipo.jobs.engine_plan import EngineSpec
from pipo.jobs.prompts import PromptSettings
from pipo.jobs.ray_engines import RayEngines, RayPlace
from pipo.planner.predict import Workload
from pipo.serving.contract import EngineClient, EngineStats
from tests.support.batches import settings_of

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


def _run(model: Path, table: Path, output: Path, *, kill_after: int | None) -> list[int]:
    """Process ids of the workers that died."""
    config = EngineConfig(ram="400MB", threads=1, context_tokens=80)
    settings = settings_of(
        model, table, output, config=config, prompts=PromptSettings(PARAMS, is_raw=True), num_sequences=2
    )
    engines: list[RayEngines] = []
    died: list[int] = []

    async def start(spec: EngineSpec) -> EngineClient:
        own = EngineSpec(spec.model, config, spec.context_tokens, spec.workload)
        engines.append(await RayEngines.start(RayPlace("local", 2), own, 2))
        assert engines[0].info.num_sequences == 4
        return engines[0]

    def tick(tally: object, stats: EngineStats, anonymous_bytes: int) -> None:
        if kill_after is not None and not died and job.tally.completion_tokens >= kill_after:
            died.append(engines[0].process_ids[0])
            os.kill(died[0], signal.SIGKILL)

    with Batch(settings) as job:
        asyncio.run(job.run(start, lambda client: None, tick, is_elsewhere=True))
        assert job.tally.num_done == NUM_ROWS and not job.tally.num_failed
        job.publish()
    return died


@pytest.mark.parametrize(
    ("address", "says"), [("127.0.0.1:9", "no cluster answers"), ("ray://x:1", "no address"), ("x", "no address")]
)
def test_an_address_where_no_cluster_is_says_so_at_once(address: str, says: str) -> None:
    spec = EngineSpec(Path("none"), EngineConfig(), 1, Workload(1, 1))
    with pytest.raises(PipoError, match=says):
        asyncio.run(RayEngines.start(RayPlace(address), spec, 1))


def test_a_worker_that_dies_costs_only_the_rows_it_had_open(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "in.csv"
    table.write_text("prompt\n" + "".join(f"row {'x' * (i % 4)} {i}\n" for i in range(NUM_ROWS)))
    assert _run(model, table, tmp_path / "calm.csv", kill_after=None) == []
    died = _run(model, table, tmp_path / "rough.csv", kill_after=1)
    assert died and not psutil.pid_exists(died[0])
    assert (tmp_path / "rough.csv").read_bytes() == (tmp_path / "calm.csv").read_bytes()
    assert (tmp_path / "calm.csv").read_text().count(",length,") == NUM_ROWS
