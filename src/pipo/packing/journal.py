"""What of a pack is on the disk: one line for each tensor that is, appended after its bytes were synced.

The first line says which pack this is: source, layout and library. A journal of another one is worth nothing. A process
that is killed while it appends leaves half a line, which is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipo.packing.part import output_failed, sync_folder

Identity = Mapping[str, object]  # of a pack: what its result depends on


class Journal:
    """`FILE.part.journal`. Raises OutputFailed. Threads: one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = path.with_name(f"{path.name}.new")

    def read(self, identity: Identity) -> list[str]:
        """Checksums of the first tensors, in file order; none where the journal is missing or of another pack."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # what has no end was being written
        except FileNotFoundError:
            return []
        except OSError as error:
            raise output_failed(self.path, error) from error
        if not lines or lines[0] != _line(identity):
            return []
        checksums: list[str] = []
        for idx, line in enumerate(lines[1:]):
            found = _parse(line)
            if found is None or found.get("tensor") != idx or not isinstance(found.get("checksum"), str):
                break
            checksums.append(str(found["checksum"]))
        return checksums

    def begin(self, identity: Identity, checksums: Sequence[str]) -> None:
        """Write it anew with what of it is right: in another file first, so that a kill loses nothing."""
        lines = [_line(identity), *map(_tensor_line, range(len(checksums)), checksums)]
        try:
            with self._fresh.open("wb") as stream:
                stream.write(b"".join(line + b"\n" for line in lines))
                stream.flush()
                os.fsync(stream.fileno())
            self._fresh.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            with suppress(OSError):
                self._fresh.unlink(missing_ok=True)
            raise output_failed(self.path, error) from error

    def append(self, first: int, checksums: Sequence[str]) -> None:
        """Tensors `first`, … are on the disk."""
        lines = map(_tensor_line, range(first, first + len(checksums)), checksums)
        try:
            with self.path.open("ab") as stream:
                stream.write(b"".join(line + b"\n" for line in lines))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise output_failed(self.path, error) from error

    def remove(self) -> None:
        for path in (self.path, self._fresh):
            with suppress(OSError):  # nobody reads it without the part
                path.unlink(missing_ok=True)


def _line(identity: Identity) -> bytes:
    return json.dumps(identity, sort_keys=True).encode()


def _tensor_line(idx: int, checksum: str) -> bytes:
    return json.dumps({"tensor": idx, "checksum": checksum}).encode()


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
