"""Whether the tokens of two models are the same, so that what they foretell can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipo.base.errors import UsageError
from pipo.formats.checkpoint import Checkpoint
from pipo.formats.hf_text import HfText
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.vocabulary import TOKENS_KEY


def check_same_vocabulary(checkpoint: Checkpoint, path: Path, other: Checkpoint, other_path: Path) -> None:
    """Raises UsageError saying where they part."""
    found, wanted = (each.manifest.hyper.vocab_size for each in (checkpoint, other))
    what = f"has a vocabulary of {found} tokens, {other_path} one of {wanted}"
    if found == wanted:
        tokens, others = _spellings(checkpoint), _spellings(other)
        # a GGUF has names for the rows that no token of a tokenizer.json uses
        are_alike = isinstance(checkpoint.metadata, HfText) is isinstance(other.metadata, HfText)
        pairs = enumerate(zip(tokens, others, strict=False))
        first = next((i for i, (a, b) in pairs if a != b and (are_alike or (a and b))), None)
        if first is None and (not are_alike or len(tokens) == len(others)):
            return
        first = min(len(tokens), len(others)) if first is None else first
        what = f"has another vocabulary than {other_path}: token {first} is {_spelled(tokens, first)}, wanted "
        what += _spelled(others, first)
    raise UsageError(f"{path}: {what}", hint="two models can be compared token by token where these are the same")


def _spellings(checkpoint: Checkpoint) -> Sequence[bytes]:
    """Each token as its file spells it."""
    if isinstance(checkpoint.metadata, HfText):
        return HfTokenizer.from_files(checkpoint.metadata).spellings()
    return checkpoint.metadata.byte_strings(TOKENS_KEY)


def _spelled(tokens: Sequence[bytes], idx: int) -> str:
    return repr(tokens[idx].decode(errors="replace"))[:80] if idx < len(tokens) else "missing"
