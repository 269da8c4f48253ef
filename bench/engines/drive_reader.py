"""The bare drive in a child process: pipo's own reads into pipo's own slots, with nothing to compute."""

from __future__ import annotations

from typing import Any

from bench.messages import ReadDrive, Request
from pipo.hardware.drive import measure_drive


class DriveReader:
    def answer(self, request: Request[Any]) -> object:
        match request:
            case ReadDrive():
                return measure_drive(request.files, request.extents, combos=request.combos, duration_s=request.seconds)
        raise TypeError(f"a drive does not serve {request}")

    def close(self) -> None:
        pass
