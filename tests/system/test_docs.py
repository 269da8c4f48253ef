"""The commands and programs in the documents run as they are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.batches import write_tables
from tests.support.hf_bytes import write_folder
from tests.support.random_adapters import write_random_adapter

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("guide/*.md"), *(ROOT / "docs").glob("concepts/*.md")])
_NOT_HERE = ("make ", "pip install")  # run by the README's own commands, not inside them


def _commands() -> list[tuple[str, str]]:
    """(document, command) of every line in a `sh` block, joined where a line ends in a backslash."""
    found = []
    for document in DOCUMENTS:
        for kind, body in _BLOCK.findall(document.read_text()):
            if kind == "sh":
                lines = body.replace("\\\n", " ").splitlines()
                found += [(document.name, line.strip()) for line in lines if line.strip() and line[0] != "#"]
    return [(name, line) for name, line in found if not line.startswith(_NOT_HERE)]


def _programs() -> list[tuple[str, str]]:
    return [
        (document.name, body)
        for document in DOCUMENTS
        for kind, body in _BLOCK.findall(document.read_text())
        if kind == "python"
    ]


@pytest.fixture
def workplace(tmp_path: Path, smollm2_path: Path) -> Path:
    """A folder in which the documents' models and texts are there."""
    (tmp_path / "model.gguf").symlink_to(smollm2_path)
    write_random_adapter(smollm2_path, tmp_path / "style.gguf", strength=0.05)
    write_folder(tmp_path / "SmolLM2-135M")
    (tmp_path / "notes.txt").write_text("The tide rises because")
    (tmp_path / "original.gguf").symlink_to(smollm2_path)
    write_tables(tmp_path)
    (tmp_path / "book.txt").write_text("The tide rises because the moon pulls the sea. " * 110)
    return tmp_path


def _environment() -> dict[str, str]:
    assert shutil.which("pipo", path=str(Path(sys.executable).parent)), "pipo is installed beside this Python"
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}


@pytest.mark.parametrize(("document", "command"), _commands())
def test_documented_command_runs(document: str, command: str, workplace: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=workplace, env=_environment(), input="", text=True, capture_output=True, timeout=90
    )
    assert done.returncode == 0, f"{document}: {command}\n{done.stderr}"


@pytest.mark.parametrize(("document", "program"), _programs())
def test_documented_program_runs(document: str, program: str, workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=workplace, env=_environment(), text=True, capture_output=True, timeout=90
    )
    assert done.returncode == 0, f"{document}:\n{done.stderr}"
    assert done.stdout.strip()
