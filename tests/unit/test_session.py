"""What a session says before it starts and after an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipo.base.units import GIB
from pipo.cli import session
from pipo.cli.flags import OutputFlags
from pipo.cli.session import Session
from pipo.cli.terminal import stderr
from pipo.hardware.memory import AvailableMemory


@pytest.mark.parametrize(("peak_bytes", "is_said"), [(99 << 20, False), (100 << 20, False), (101 << 20, True)])
def test_a_peak_above_the_limit_is_said_even_when_quiet(
    capsys: pytest.CaptureFixture[str], peak_bytes: int, is_said: bool
) -> None:
    stderr.cache_clear()
    engine: Any = SimpleNamespace(report=SimpleNamespace(peak_anonymous_bytes=peak_bytes))
    plan: Any = SimpleNamespace(limit_bytes=100 << 20, prediction=None)
    Session(engine, plan, OutputFlags(quiet=True)).print_cost()
    stderr.cache_clear()
    said = capsys.readouterr().err
    warning = "warning: the process had 101.0 MiB of anonymous memory, more than the limit of 100.0 MiB\n"
    assert said == (warning if is_said else "")


@pytest.mark.parametrize(("left_bytes", "is_warned"), [(GIB, True), (8 * GIB, False)])
def test_a_plan_for_more_than_there_is_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left_bytes: int, is_warned: bool
) -> None:
    monkeypatch.setattr(session, "available_memory", lambda: AvailableMemory(left_bytes, "control group /x"))
    monkeypatch.setattr(session, "process_memory", lambda: SimpleNamespace(anonymous_bytes=GIB))
    plan: Any = SimpleNamespace(placement=SimpleNamespace(num_bytes=5 * GIB))
    session._warn_of_scarcity(plan)
    said = capsys.readouterr().err
    assert ("takes 4.0 GiB more, and there are 1.0 GiB left (control group /x)" in " ".join(said.split())) == is_warned
