"""Engines for tests: a budget exact to the byte, and a drive that is known without a probe or breaks on demand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipo import plan
from pipo.base.config import EngineConfig
from pipo.engine import Engine
from pipo.hardware import host
from pipo.hardware.drive import DriveRate
from pipo.model_file import ModelFile
from pipo.pipeline import assembly
from pipo.pipeline.blueprint import demand
from pipo.planner.placement import smallest_bytes
from pipo.transfer.disk import DiskTransfer
from pipo.transfer.files import Preadv

PLENTY = 1 << 50  # bytes
KNOWN_DRIVE = DriveRate(chunk_bytes=64 << 10, num_workers=3, bytes_per_s=1e9, direct=True)


def start_engine(path: Path, *, ram_bytes: int = PLENTY, preadv: Preadv | None = None, **settings: Any) -> Engine:
    """A started engine of one compute thread. Its budget leaves the process out, so that it means the same in every
    test run; compute is timed no longer than needed, and the user's cache of drive rates neither read nor written.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "drive_rates", lambda files, **_: (KNOWN_DRIVE,))
        patch.setattr(plan.PlanMaker, "_process_bytes", lambda self: 0)
        if preadv is not None:
            patch.setattr(assembly, "DiskTransfer", partial(DiskTransfer, preadv=preadv))
        engine = Engine(ModelFile(path), EngineConfig(**{"ram": str(ram_bytes), "threads": 1, **settings}))
        try:
            engine.start(engine.make_plan())
        except BaseException:
            engine.close()
            raise
    return engine


def smallest_ram_bytes(path: Path, **settings: Any) -> int:
    """The least `ram_bytes` that `start_engine` takes with the same settings: every weight streams."""
    with start_engine(path, **settings) as engine:
        assert engine.plan is not None
        return smallest_bytes(demand(engine.plan.blueprint, engine.plan.context_tokens, 0, process_bytes=0))
