"""What a tokenizer.json does to text before merges, in the words of a GGUF: the name of a pre-tokenizer, or marks for
spaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipo.base.errors import UnsupportedModel
from pipo.text.pretokenizers import GPT2_PATTERN, PRE_TOKENIZERS

Part = Mapping[str, Any]  # as the tokenizers library describes one

_MARK = "▁"
_TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_PREFIX = {"type": "Prepend", "prepend": _MARK}
# Of names that mean the same those that llama.cpp's converter gives the models that pipo runs
_PREFERRED = ("llama-bpe", "gpt-2", "smollm", "qwen2", "dbrx", "gpt-4o", "tekken", "deepseek-v3")


@dataclass(frozen=True, slots=True)
class Spelling:
    """`pre` names how byte-level words are cut; None: spaces become marks, one before text if `prefixes_space`.

    `normalises`: text is brought to NFC first, which a GGUF cannot say.
    """

    pre: str | None
    prefixes_space: bool = False
    normalises: bool = False


def read_spelling(normalizer: object, pre_tokenizer: object, *, ignores_merges: bool, name: str) -> Spelling:
    """From the library's objects. Raises UnsupportedModel for what a GGUF has no name for."""
    normalisers, cuts = list(_steps(normalizer, "normalizers")), list(_steps(pre_tokenizer, "pretokenizers"))
    if cuts and cuts[-1]["type"] == "ByteLevel":
        return _byte_level(normalisers, cuts, ignores_merges=ignores_merges, name=name)
    return _marked(normalisers, cuts, name)


def _byte_level(normalisers: list[Part], cuts: list[Part], *, ignores_merges: bool, name: str) -> Spelling:
    normalises = normalisers == [{"type": "NFC"}]
    if normalisers and not normalises:
        raise _nameless(name, "normalizer", normalisers)
    patterns = tuple(_pattern(cut) or "" for cut in cuts[:-1])
    if cuts[-1]["add_prefix_space"] or "" in patterns:
        raise _nameless(name, "pre-tokenizer", cuts)
    if cuts[-1]["use_regex"]:
        patterns += (GPT2_PATTERN,)
    for pre in (*_PREFERRED, *PRE_TOKENIZERS):
        known = PRE_TOKENIZERS[pre]
        if known.is_byte_level and (known.patterns, known.ignores_merges) == (patterns, ignores_merges):
            return Spelling(pre, normalises=normalises)
    raise _nameless(name, "pre-tokenizer", cuts, f", merges {'' if ignores_merges else 'not '}ignored for whole words,")


def _pattern(cut: Part) -> str | None:
    """The expression at whose matches text is cut. None for anything else.

    A cut that removes what lies between matches is one that keeps it only where the matches cover all text, as those
    of the known pre-tokenizers do.
    """
    if cut["type"] == "Digits":
        return r"\p{N}" if cut["individual_digits"] else r"\p{N}+"
    if cut["type"] != "Split" or "Regex" not in cut["pattern"]:
        return None
    keeps = (cut["behavior"], cut["invert"]) in (("Isolated", False), ("Removed", True))
    return str(cut["pattern"]["Regex"]) if keeps else None


def _marked(normalisers: list[Part], cuts: list[Part], name: str) -> Spelling:
    """Three ways to say it: with or without a mark before text, or by a pre-tokenizer."""
    if not normalisers and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and cuts[0]["replacement"] == _MARK:
        return Spelling(None, prefixes_space=cuts[0]["prepend_scheme"] != "never")
    if normalisers not in ([_TO_MARKS], [_PREFIX, _TO_MARKS]):
        raise _nameless(name, "normalizer", normalisers)
    # spaces are marks already: cutting there does nothing
    if any(cut["type"] != "Split" or cut["pattern"] != {"String": " "} for cut in cuts):
        raise _nameless(name, "pre-tokenizer", cuts)
    return Spelling(None, prefixes_space=len(normalisers) == 2)


def _nameless(name: str, what: str, parts: list[Part], more: str = "") -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: the {what} {json.dumps(parts, ensure_ascii=False)[:300]}{more} is none that a GGUF can name",
        hint="the folder itself runs as it is",
    )


def _steps(part: Any, inner: str) -> Iterator[Part]:
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), inner)


def _flat(part: Part, inner: str) -> Iterator[Part]:
    if part["type"] != "Sequence":
        yield part
        return
    for each in part[inner]:
        yield from _flat(each, inner)
