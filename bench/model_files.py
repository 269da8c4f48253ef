"""Which model a bench runs on: a file of the user's, or one of random weights made for the occasion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import random_mixture
from bench.random_model import write_random_model


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`path` of a file that is there, or `shape` and `type` of one to write."""

    path: Path | None = None
    shape: str = ""
    type: str = ""

    @property
    def name(self) -> str:
        return self.path.stem if self.path else f"{self.shape} {self.type}"


@contextmanager
def model_file(source: ModelSource, folder: Path, keep: bool) -> Iterator[Path]:
    """The file, out of the page cache. One that was written here is removed in the end, unless `keep`."""
    if source.path is not None:
        drop_cached(source.path)
        yield source.path
        return
    path = folder / f"random-{source.shape}-{source.type}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            aside = path.with_suffix(".part")
            aside.unlink(missing_ok=True)
            if source.shape in random_mixture.SHAPES:
                random_mixture.write_random_mixture(aside, source.shape)
            else:
                write_random_model(aside, source.shape, source.type)
            aside.rename(path)
        drop_cached(path)
        yield path
    finally:
        if not keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".part").unlink(missing_ok=True)


@contextmanager
def copied(path: Path, name: str) -> Iterator[Path]:
    """Another file of the same bytes, for one that shall not share the page cache. Removed in the end."""
    copy = path.with_name(f"{path.stem}-{name}{path.suffix}")
    try:
        shutil.copyfile(path, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        drop_cached(copy)
        drop_cached(path)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def drop_cached(path: Path) -> None:
    """Take the file out of the page cache, so that nobody begins with a part of it. Linux only, else a wish."""
    if not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
