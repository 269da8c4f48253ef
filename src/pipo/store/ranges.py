"""A range of a file's bytes, from a server that may know no ranges."""

from __future__ import annotations

import logging
import time

from pipo.base.errors import DownloadError
from pipo.base.units import MIB
from pipo.store.fetch import Patience
from pipo.store.request import Address, Dropped, content_start, open_url, reader

log = logging.getLogger(__name__)

_CHUNK_BYTES = MIB


def read_range(address: Address, first: int, end: int, file_bytes: int, patience: Patience | None = None) -> bytes:
    """Bytes `first` to `end` of a file that has `file_bytes`. Raises NoAccess, DownloadError."""
    patience = patience or Patience(num_tries=4)
    for num_failures in range(patience.num_tries):
        try:
            return _read_once(address, first, end, file_bytes, patience.timeout_s)
        except Dropped as error:
            reason, wait_s = str(error), max(error.wait_s, patience.wait_s * 2**num_failures)
            log.warning("url=%s first=%d reason=%r action=retry", address, first, reason)
        if num_failures + 1 < patience.num_tries:
            time.sleep(min(wait_s, patience.timeout_s))
    raise DownloadError(
        f"{address}: gave up after {patience.num_tries} tries for bytes {first} to {end}: {reason}",
        hint="try again later",
    )


def _read_once(address: Address, first: int, end: int, file_bytes: int, timeout_s: float) -> bytes:
    with open_url(address, f"{first}-{end - 1}", timeout_s) as response:
        offset, total = content_start(response, first)
        if total not in (None, file_bytes):
            raise DownloadError(f"{address}: the hub lists {file_bytes} bytes, the server has {total}")
        read = reader(response)
        while offset < first:  # a server that knows no ranges sends everything
            skipped = len(read(min(_CHUNK_BYTES, first - offset)))
            if not skipped:
                raise Dropped("the server closed the connection early")
            offset += skipped
        parts = []
        while offset < end:
            data = read(min(_CHUNK_BYTES, end - offset))
            if not data:
                raise Dropped("the server closed the connection early")
            parts.append(data)
            offset += len(data)
    return b"".join(parts)
