"""What a session says after an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipo.cli.flags import OutputFlags
from pipo.cli.session import Session
from pipo.cli.terminal import stderr


@pytest.mark.parametrize(("peak_bytes", "is_said"), [(99 << 20, False), (100 << 20, False), (101 << 20, True)])
def test_a_peak_above_the_limit_is_said_even_when_quiet(
    capsys: pytest.CaptureFixture[str], peak_bytes: int, is_said: bool
) -> None:
    stderr.cache_clear()
    engine: Any = SimpleNamespace(report=SimpleNamespace(peak_anonymous_bytes=peak_bytes))
    plan: Any = SimpleNamespace(limit_bytes=100 << 20)
    Session(engine, plan, OutputFlags(quiet=True)).print_cost()
    stderr.cache_clear()
    said = capsys.readouterr().err
    warning = "warning: the process had 101.0 MiB of anonymous memory, more than the limit of 100.0 MiB\n"
    assert said == (warning if is_said else "")
