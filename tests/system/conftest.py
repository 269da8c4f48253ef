"""The command line that system tests drive, and a browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser, page_server
from tests.support.command_line import CommandLine


@pytest.fixture(scope="session")
def pipo(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """One environment for all: its drive is measured once."""
    return CommandLine.in_folder(tmp_path_factory.mktemp("pipo"), smollm2_path.resolve())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """For a module and no longer: while it is open its event loop is the thread's, and asyncio.run refuses."""
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def stand_in() -> Iterator[page_server.Server]:
    with page_server.running() as server:
        yield server


@pytest.fixture
def tab(chromium: Any, stand_in: page_server.Server) -> Iterator[browser.Tab]:
    """Errors that the browser itself reports of refused requests are looked at by the tests that cause them."""
    with browser.tab(chromium, stand_in.url, viewport={"width": 1280, "height": 800}) as opened:
        yield opened
        opened.errors = [error for error in opened.errors if not error.startswith("Failed to load resource")]
        opened.check()


@pytest.fixture
def site() -> Iterator[str]:
    """Where a page is served that answers by itself: PIPO_PAGE_URL (a `pipo serve`), or a stand-in."""
    url = os.environ.get("PIPO_PAGE_URL")
    with fed_stand_in() if url is None else given(url) as found:
        yield found


@contextmanager
def given(url: str) -> Iterator[str]:
    yield url.rstrip("/")


@contextmanager
def fed_stand_in() -> Iterator[str]:
    with page_server.running() as server, page_server.fed(server):
        yield server.url
