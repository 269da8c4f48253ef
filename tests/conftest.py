"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipo.store.library import KNOWN_MODELS

pytest.register_assert_rewrite("tests.support")  # what fails there should say what differed


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, 98 MB: PIPO_TEST_MODEL or what `pipo pull smollm2` fetched."""
    path = Path(os.environ.get("PIPO_TEST_MODEL", KNOWN_MODELS["smollm2"].path))
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: run `pipo pull smollm2`")
    return path


# a shell that runs the suite in the background has Ctrl-C ignored, and so would every `pipo` that a test interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
