"""The bytes of a GGUF header: one small window that walks over the file and checks every claim before reading."""

from __future__ import annotations

import struct
from io import FileIO
from pathlib import Path

from pipo.base.errors import MalformedFile, ReadFailed
from pipo.base.units import MIB, format_size

WINDOW_BYTES = 256 * 1024
MAX_HEADER_BYTES = 256 * MIB  # room for a million tokens, their merges and a copy of tokenizer.json
MAX_TEXT_BYTES = 64 * MIB  # keys, names and string values of one file together: they stay in memory
MAX_ARRAY_STRINGS = 1 << 22  # in one file; a vocabulary of 262k has about 0.8 million with its merges

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
INCOMPLETE = "the file is incomplete or damaged: download it again"


class HeaderReader:
    """Reads little-endian values in order. `subject` is what an error says it was reading.

    Holds one window of WINDOW_BYTES (or one string, where that is longer). Never reads past the file's end as it was
    when opened, nor past MAX_HEADER_BYTES. Threads: one. Raises: MalformedFile, ReadFailed.
    """

    def __init__(self, file: FileIO, path: Path, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.subject = "the header"
        self._file = file
        self._base = 0  # where in the file the window starts
        self._window = b""
        self._cursor = 0  # in the window; may lie past its end after a skip
        self._text_left = MAX_TEXT_BYTES
        self._strings_left = MAX_ARRAY_STRINGS

    @property
    def position(self) -> int:
        return self._base + self._cursor

    def malformed(self, detail: str, *, hint: str | None = None) -> MalformedFile:
        return MalformedFile(f"{self.path}: {self.subject} {detail}", hint=hint)

    def require(self, num_bytes: int) -> None:
        """Raise MalformedFile unless `num_bytes` more can follow."""
        end = self.position + num_bytes
        if end > self.file_bytes:
            raise self.malformed(
                f"needs {num_bytes} bytes at offset {self.position}, the file ends at {self.file_bytes}",
                hint=INCOMPLETE,
            )
        if end > MAX_HEADER_BYTES:
            raise self.malformed(f"ends at byte {end}, a header may take {format_size(MAX_HEADER_BYTES)}")

    def require_items(self, count: int, least_bytes: int, what: str) -> None:
        """Raise MalformedFile unless `count` items of at least `least_bytes` each can follow."""
        left = min(self.file_bytes, MAX_HEADER_BYTES) - self.position
        if count * least_bytes > left:
            raise self.malformed(
                f"claims {count} {what} of at least {least_bytes} bytes at offset {self.position}, "
                f"{left} bytes are left",
                hint=INCOMPLETE,
            )

    def take(self, num_bytes: int) -> bytes:
        self.require(num_bytes)
        if self._cursor + num_bytes > len(self._window):
            self._refill(num_bytes)
        start = self._cursor
        self._cursor += num_bytes
        return self._window[start : self._cursor]

    def skip(self, num_bytes: int) -> None:
        self.require(num_bytes)
        self._cursor += num_bytes

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def text(self, what: str, most_bytes: int) -> str:
        """Read a string that stays in memory. `what` names it: "key", "name", "value"."""
        num_bytes = self.u64()
        most_bytes = min(most_bytes, self._text_left)
        if num_bytes > most_bytes:
            raise self.malformed(f"has a {what} of {num_bytes} bytes, at most {most_bytes} can be")
        raw = self.take(num_bytes)
        self._text_left -= num_bytes
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"has a {what} that is not UTF-8: byte {error.start} of {raw[:40]!r}") from None

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings. Cost: 0.1 µs each, no memory."""
        if count > self._strings_left:
            raise self.malformed(f"claims {count} strings, a header may have {MAX_ARRAY_STRINGS} in its arrays")
        self._strings_left -= count
        while count:
            count -= self._skip_strings_in_window(count)
            if count:  # the next one crosses the window's end
                self.skip(self.u64())
                count -= 1

    def _skip_strings_in_window(self, most: int) -> int:
        window, cursor, end = self._window, self._cursor, len(self._window)
        length_of = _U64.unpack_from
        num_skipped = 0
        while num_skipped < most and cursor + 8 <= end:
            after = cursor + 8 + length_of(window, cursor)[0]
            if after > end:
                break
            cursor = after
            num_skipped += 1
        self._cursor = cursor
        return num_skipped

    def _refill(self, num_bytes: int) -> None:
        self._base, self._cursor = self.position, 0
        wanted = min(max(num_bytes, WINDOW_BYTES), self.file_bytes - self._base)
        self._window = b""  # the old one is not kept while the new one is read
        self._window = read_at(self._file, self.path, self._base, wanted)


def read_at(file: FileIO, path: Path, offset: int, num_bytes: int) -> bytes:
    """All of `num_bytes`. Raises ReadFailed, or MalformedFile when the file turns out shorter."""
    parts: list[bytes] = []
    missing = num_bytes
    try:
        file.seek(offset)
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
    except OSError as error:
        raise ReadFailed(
            f"cannot read: {error}", path=str(path), offset=offset, wanted_bytes=num_bytes, got_bytes=0
        ) from error
    if missing:
        raise MalformedFile(
            f"{path}: wanted {num_bytes} bytes at offset {offset}, got {num_bytes - missing}", hint=INCOMPLETE
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)
