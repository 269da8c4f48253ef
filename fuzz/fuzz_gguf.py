"""Feed mutated GGUF files to the reader: anything but a parse or a ModelError is a finding.

    PYTHONPATH=src:. python fuzz/fuzz_gguf.py --seconds 60 [--seed 7]

With atheris installed, `--atheris` runs coverage-guided instead and passes unknown arguments to libFuzzer. A finding
is kept in fuzz/corpus/gguf, which every run replays first and the tests replay too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from pipo.base.errors import ModelError
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf_metadata import ArrayRef, ValueType
from tests.support.gguf_bytes import rich_llama, small_llama

CORPUS = Path(__file__).parent / "corpus" / "gguf"
SLOW_S = 5.0
_INTERESTING = (0, 1, 7, 8, 63, 64, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)

log = logging.getLogger("fuzz_gguf")


class TooSlowError(Exception):
    """One input took more than SLOW_S."""


def explore(path: Path) -> bool:
    """Open `path` and read every array. True when it parsed, False when it was refused."""
    begun_s = time.monotonic()
    try:
        metadata = open_checkpoint(path).metadata
        for name in metadata:
            ref = metadata.get(name)
            if isinstance(ref, ArrayRef):
                items = metadata.byte_strings(name) if ref.element_type is ValueType.STRING else metadata.array(name)
                assert len(items) == ref.count
        return True
    except ModelError:
        return False
    finally:
        if time.monotonic() - begun_s > SLOW_S:
            raise TooSlowError(f"took {time.monotonic() - begun_s:.1f} s")


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to eight changes; most fall where the header is."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(min(len(changed), 1 << rng.randrange(4, 21)) or 1)
        part = changed[at : at + rng.randrange(1, 64)]
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                width = rng.choice((1, 2, 4, 8))
                changed[at : at + width] = (rng.choice(_INTERESTING) % 256**width).to_bytes(width, "little")
            case 2:
                del changed[at : at + len(part)]
            case 3:
                changed[at:at] = part
            case 4:
                target = rng.randrange(len(changed) + 1)
                changed[target : target + len(part)] = part
            case _:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def try_one(raw: bytes, path: Path) -> bool:
    """Explore `raw`. A finding is kept, and raised again."""
    path.write_bytes(raw)
    try:
        return explore(path)
    except Exception:
        CORPUS.mkdir(parents=True, exist_ok=True)
        kept = CORPUS / f"{hashlib.sha256(raw).hexdigest()[:16]}.bin"  # .gguf is in .gitignore
        kept.write_bytes(raw)
        log.error("finding kept=%s", kept)
        raise


def fuzz(seeds: list[bytes], seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    log.info("seed=%d seeds=%d seconds=%g", seed, len(seeds), seconds)
    num_parsed = num_refused = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.gguf")
        for raw in seeds:
            try_one(raw, path)
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            if try_one(mutate(rng.choice(seeds), rng), path):
                num_parsed += 1
            else:
                num_refused += 1
    log.info("parsed=%d refused=%d findings=0", num_parsed, num_refused)


def fuzz_with_atheris(arguments: list[str]) -> None:
    atheris = importlib.import_module("atheris")
    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as folder:
        path, corpus = Path(folder, "fuzz.gguf"), Path(folder, "corpus")
        corpus.mkdir()
        for idx, raw in enumerate(read_seeds()):
            (corpus / str(idx)).write_bytes(raw)
        atheris.Setup([sys.argv[0], *arguments, str(corpus)], lambda raw: try_one(raw, path))
        atheris.Fuzz()


def read_seeds() -> list[bytes]:
    kept = [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]
    return [bytes(small_llama()), bytes(rich_llama()), *kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="repeat the run that printed this number")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; the rest goes to libFuzzer")
    options, rest = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.atheris:
        fuzz_with_atheris(rest)
        return
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    fuzz(read_seeds(), options.seconds, seed)


if __name__ == "__main__":
    main()
