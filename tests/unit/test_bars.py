"""cli.bars: nothing for what is quick, a bar for what is not."""

from __future__ import annotations

import io

import pytest

from pipo.cli import bars, terminal
from pipo.cli.flags import OutputFlags

Console = terminal._Console


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(terminal, "stderr", lambda: console)
    return stream


def work(output: OutputFlags = OutputFlags()) -> None:  # noqa: B008
    with bars.byte_bar("packing", output) as advance:
        for done in range(11):
            advance(done << 20, 10 << 20)


def test_quick_work_shows_nothing(shown: io.StringIO) -> None:
    work()
    assert shown.getvalue() == ""


def test_slow_work_shows_how_far_it_is(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SHOWN_AFTER_S", 0.0)
    work()
    assert ("packing" in shown.getvalue() and "10.5/10.5" in shown.getvalue()) or "10.0/10.0 MiB" in shown.getvalue()


@pytest.mark.parametrize("is_quiet", [True, False])
def test_quiet_or_unseen_it_shows_nothing(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, is_quiet: bool
) -> None:
    monkeypatch.setattr(bars, "SHOWN_AFTER_S", 0.0)
    if not is_quiet:
        monkeypatch.setattr(terminal, "stderr", lambda: Console(file=shown, force_terminal=False))
    work(OutputFlags(quiet=is_quiet))
    assert shown.getvalue() == ""
