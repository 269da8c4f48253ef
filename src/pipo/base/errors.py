"""Every error pipo raises on purpose.

PipoError                     anything we can name; `hint` says what to do, `exit_code` what a shell sees
├── UsageError                a flag, size or argument that cannot be used                      (2)
├── OverBudget                the limit is too small; names the smallest that works             (2)
├── ContextOverflow           prompt plus answer do not fit the context; nothing is ever cut    (2)
├── ModelError                the model file
│   ├── MalformedFile         breaks its format: truncated, overlapping, out of range           (1)
│   ├── DamagedFile           its bytes are not those that its checksums were taken of          (1)
│   ├── NoChecksums           sound as far as can be seen, but there is nothing to compare it with  (3)
│   ├── UnsupportedModel      well formed, but needs something pipo does not implement          (1)
│   └── ModelNotFound         no such file or model name                                        (1)
├── MalformedProfile          a machine profile that cannot be used: key, wanted, found         (1)
├── MalformedTrace            a record of experts that cannot be read: line, wanted, found          (1)
├── MalformedTable            rows of a job that cannot be read: place, wanted, found           (1)
├── LibraryError              libggml is missing, too old, or not laid out as expected          (1)
├── ComputeError              a graph could not be built or run                                 (1)
│   └── OutOfDeviceMemory     a device has not this much memory left; names wanted and free     (1)
├── TransferError             bytes that did not arrive: file, offset, wanted and got           (1)
│   ├── ReadFailed            the operating system refused (EIO, EBADF, …)                      (1)
│   ├── UnexpectedEof         the file ends before the bytes do                                 (1)
│   └── FileChanged           the file is not the one that was opened                           (1)
├── EngineBusy                as many requests wait as may; later it may be taken                (1)
├── EngineDied                the process that computes has ended, and what it was asked for with it (1)
├── OutputFailed              a file that could not be written: which one, why, how much is free (1)
├── DownloadError             a fetch that failed or did not match its checksum                 (1)
├── RowsFailed                a job is complete, and some of its rows have an error for an answer  (3)
└── Cancelled                 the user or a signal stopped it                                   (130)
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "Cancelled",
    "ComputeError",
    "ContextOverflow",
    "DamagedFile",
    "DownloadError",
    "EngineBusy",
    "EngineDied",
    "FileChanged",
    "LibraryError",
    "MalformedFile",
    "MalformedProfile",
    "MalformedTable",
    "MalformedTrace",
    "ModelError",
    "ModelNotFound",
    "NoChecksums",
    "OutOfDeviceMemory",
    "OutputFailed",
    "OverBudget",
    "PipoError",
    "ReadFailed",
    "RowsFailed",
    "TransferError",
    "UnexpectedEof",
    "UnsupportedModel",
    "UsageError",
]


class PipoError(Exception):
    """Base of the tree. `str(error)` is the message, then a blank line and `hint: …` where there is one."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        """So that it can go to another process, whatever its class is made of."""
        return _bare, (type(self),), (self.args, self.__dict__)

    def __setstate__(self, state: Any) -> None:
        self.args, attributes = state
        self.__dict__.update(attributes)


def _bare(kind: type[PipoError]) -> PipoError:
    return kind.__new__(kind)


class UsageError(PipoError):
    exit_code = 2


class OverBudget(PipoError):
    """`smallest_bytes` is a `--ram` that works; None when no amount would."""

    exit_code = 2

    def __init__(self, message: str, *, smallest_bytes: int | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.smallest_bytes = smallest_bytes


class ContextOverflow(PipoError):
    exit_code = 2


class ModelError(PipoError):
    pass


class MalformedFile(ModelError):
    pass


class DamagedFile(ModelError):
    pass


class NoChecksums(ModelError):
    exit_code = 3


class UnsupportedModel(ModelError):
    pass


class ModelNotFound(ModelError):
    pass


class MalformedProfile(PipoError):
    """`key` is the path of the figure, as in `devices[0].products.Q4_0.plain.points[1][0]`."""

    def __init__(self, key: str, wanted: str, found: object) -> None:
        super().__init__(
            f"a machine profile cannot be used: {key:.200} must be {wanted}, found {found!r:.80}",
            hint="`pipo doctor --probe --fresh` measures this machine again",
        )
        self.key = key
        self.wanted = wanted
        self.found = found

    def in_file(self, path: object) -> MalformedProfile:
        """The same of a file that the user named."""
        error = MalformedProfile(self.key, self.wanted, self.found)
        error.message = f"{path}: {self.message.removeprefix('a machine profile ')}"
        error.hint = "`pipo doctor --probe --json` on that machine writes one"
        return error


class MalformedTrace(PipoError):
    pass


class MalformedTable(PipoError):
    pass


class LibraryError(PipoError):
    pass


class ComputeError(PipoError):
    pass


class OutOfDeviceMemory(ComputeError):
    """`wanted_bytes` at once is more than the `free_bytes` of the device, or than it gives to one buffer."""

    def __init__(self, message: str, *, wanted_bytes: int, free_bytes: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class TransferError(PipoError):
    """`path`, `offset` and `wanted_bytes` say which bytes; `got_bytes` how many arrived."""

    def __init__(
        self, message: str, *, path: str, offset: int, wanted_bytes: int, got_bytes: int, hint: str | None = None
    ) -> None:
        super().__init__(
            f"{message}: {path} at offset {offset}, wanted {wanted_bytes} bytes, got {got_bytes}", hint=hint
        )
        self.path = path
        self.offset = offset
        self.wanted_bytes = wanted_bytes
        self.got_bytes = got_bytes


class ReadFailed(TransferError):
    pass


class UnexpectedEof(TransferError):
    pass


class FileChanged(TransferError):
    pass


class EngineBusy(PipoError):
    """The queue of an engine is full."""


class EngineDied(PipoError):
    """Of itself, or killed by somebody."""


class OutputFailed(PipoError):
    pass


class RowsFailed(PipoError):
    exit_code = 3


class DownloadError(PipoError):
    pass


class Cancelled(PipoError):
    exit_code = 130
