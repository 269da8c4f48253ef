"""What the command line says between planning and starting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipo.base.units import GIB
from pipo.cli import session
from pipo.hardware.memory import AvailableMemory


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
