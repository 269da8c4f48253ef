"""How a packed file says what its bytes are: BLAKE2b of each tensor and of the header, in its own metadata.

Of the hashes in Python's standard library BLAKE2b is never slow: 1.0 GB/s a thread on a Xeon, where SHA-256 gives 1.1
with the CPU's SHA instructions, and less than half without them. A tensor's checksum is that of its bytes alone, so
`b2sum -l 256` agrees. The header's is of the header with sixty-four zeros in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pipo.base.errors import DamagedFile, UnsupportedModel
from pipo.formats.gguf import Gguf, entry_spans

OWN_PREFIX = "pipo."
ALGORITHM = "blake2b-256"
ALGORITHM_KEY, TENSORS_KEY, HEADER_KEY = "pipo.checksum.algorithm", "pipo.checksum.tensors", "pipo.checksum.header"
NUM_DIGITS = 64
NO_CHECKSUM = "0" * NUM_DIGITS

Hash: Callable[..., hashlib.blake2b] = partial(hashlib.blake2b, digest_size=NUM_DIGITS // 2)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a file says of itself. `header_offset` is where the header's checksum stands in it."""

    by_tensor: dict[str, str]
    header: str
    header_offset: int


def recorded_checksums(gguf: Gguf) -> Recorded | None:
    """None for a file without any, and for one that was split after it was packed.

    Raises DamagedFile where they do not belong to these tensors, UnsupportedModel for another algorithm.
    """
    metadata = gguf.metadata
    if len(gguf.files) > 1 or not any(key.startswith(OWN_PREFIX) for key in metadata):
        return None
    algorithm = metadata.text(ALGORITHM_KEY)
    if algorithm not in (None, ALGORITHM):
        raise UnsupportedModel(
            f"{metadata.path}: its checksums are {algorithm!r:.80}, wanted {ALGORITHM}",
            hint="a newer pipo may know them",
        )
    checksums = metadata.strings(TENSORS_KEY) if TENSORS_KEY in metadata else []
    header = metadata.text(HEADER_KEY) or ""
    if len(checksums) != len(gguf.tensors) or len(header) != NUM_DIGITS:
        raise DamagedFile(
            f"{metadata.path}: has {len(checksums)} checksums for {len(gguf.tensors)} tensors, and one of "
            f"{len(header)} characters for its header, wanted {NUM_DIGITS}",
            hint="another tool changed the file after it was packed, or it is damaged: pack the model again",
        )
    start, num_bytes = entry_spans(metadata)[HEADER_KEY]
    return Recorded(dict(zip(gguf.tensors, checksums, strict=True)), header, start + num_bytes - NUM_DIGITS)
