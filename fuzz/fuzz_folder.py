"""Feed mutated files of a Hugging Face folder to its readers: anything but a parse or a ModelError is a finding.

    PYTHONPATH=src:. python fuzz/fuzz_folder.py --seconds 60 [--file config.json] [--seed 7]

A finding is kept in fuzz/corpus/folder under the name of the file that was changed; every run replays it first, and the
tests replay it too.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import tempfile
import time
from pathlib import Path

from fuzz_gguf import SLOW_S, TooSlowError, mutate

from pipo.base.errors import ModelError
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.hf_text import HfText
from pipo.models.registry import stages_of
from pipo.text.hf_tokenizer import HfTokenizer
from tests.support.hf_bytes import write_sharded

CORPUS = Path(__file__).parent / "corpus" / "folder"

log = logging.getLogger("fuzz_folder")


def explore(folder: Path) -> bool:
    """Open the model and its tokenizer. True when they parsed, False when they were refused."""
    begun_s = time.monotonic()
    try:
        opened = open_checkpoint(folder)
        stages_of(opened.manifest)
        assert isinstance(opened.metadata, HfText)
        HfTokenizer.from_files(opened.metadata).encode("a <|im_end|> b", add_special=True, parse_special=True)
        return True
    except ModelError:
        return False
    finally:
        if time.monotonic() - begun_s > SLOW_S:
            raise TooSlowError(f"took {time.monotonic() - begun_s:.1f} s")


def try_one(folder: Path, name: str, raw: bytes) -> bool:
    """Explore the folder with `raw` in place of one of its files. A finding is kept, and raised again."""
    path = folder / name
    kept = path.read_bytes()
    path.write_bytes(raw)
    try:
        return explore(folder)
    except BaseException:
        finding = CORPUS / name / f"{hashlib.sha256(raw).hexdigest()[:16]}.bin"
        finding.parent.mkdir(parents=True, exist_ok=True)
        finding.write_bytes(raw)
        log.error("finding kept=%s", finding)
        raise
    finally:
        path.write_bytes(kept)


def fuzz(folder: Path, names: list[str], seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    log.info("seed=%d files=%s seconds=%g", seed, ",".join(names), seconds)
    for name in names:
        for finding in sorted((CORPUS / name).glob("*.bin")):
            try_one(folder, name, finding.read_bytes())
    counts = {True: 0, False: 0}
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        name = rng.choice(names)
        counts[try_one(folder, name, mutate((folder / name).read_bytes(), rng))] += 1
    log.info("parsed=%d refused=%d findings=0", counts[True], counts[False])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--file", default=None, help="the only one to change; else any of the folder")
    parser.add_argument("--seed", type=int, default=None, help="repeat the run that printed this number")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as name:
        folder = write_sharded(Path(name, "model"))
        names = [options.file] if options.file else sorted(path.name for path in folder.iterdir())
        fuzz(folder, names, options.seconds, seed)


if __name__ == "__main__":
    main()
