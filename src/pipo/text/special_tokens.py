"""Tokens with a role (begin, end of turn, …) and how they are found in text.

Files often leave roles and kinds out, so both are completed from the tokens' texts. Source of the texts: llama.cpp
`src/llama-vocab.cpp`, which gathered them from published models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipo.text.prefix_texts import PrefixTexts
from pipo.text.vocabulary import Keys, TokenizerMetadata, TokenKind, ids_of_kinds, read_token_id


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids by role, None where the model has none. `ends`: every token that ends a generation, eos and eot included."""

    bos: int | None
    eos: int | None
    eot: int | None  # end of turn
    eom: int | None  # end of message: the assistant waits for a tool
    unk: int | None
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class DefaultIds:
    """What a tokenizer model's ids are where the file does not say."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None


_END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
_END_OF_MESSAGE = ("<|eom_id|>",)
_OTHER_ENDS = (
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>",
    "[e~[",
)  # fmt: skip
_NOT_ENDS = {  # text: sets of ends, beside any of which it is not one itself
    "<|end|>": [{other, call} for other in ("<|return|>", "<|flush|>") for call in ("<|call|>", "<|calls|>")],
    "</s>": [{"<|tool_response>"}, {"<|plamo:eos|>"}],
}
_KINDS_WHEN_NOT_ENDS = {"<|end|>": TokenKind.USER_DEFINED, "</s>": TokenKind.NORMAL}
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: the answer's parts


@dataclass(frozen=True, slots=True)
class _FillRole:
    """A token of fill-in-the-middle prompts. The model is not to write them; three end a generation."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    is_end: bool = False


_FILL_ROLES = (
    _FillRole(
        ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
        ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
         "<|prefix|>"),
    ),
    _FillRole(
        ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
        ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
         "<|suffix|>"),
    ),
    _FillRole(
        ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
        ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
         "<|middle|>"),
    ),
    _FillRole(("tokenizer.ggml.fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    _FillRole(
        ("tokenizer.ggml.fim_rep_token_id",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        True,
    ),
    _FillRole(("tokenizer.ggml.fim_sep_token_id",), ("<|file_sep|>",), True),
)  # fmt: skip


def find_special_ids(
    metadata: Keys, token_ids: Mapping[str, int], kinds: bytearray, defaults: DefaultIds
) -> SpecialIds:
    """Roles from the file, completed from the tokens' texts; corrects `kinds` where a text says more than the file."""
    size = len(kinds)

    def role(name: str, default: int | None) -> int | None:
        token_id = read_token_id(metadata, f"tokenizer.ggml.{name}_token_id", size)
        return default if token_id is None and default is not None and default < size else token_id

    eos = role("eos", defaults.eos)
    eot = role("eot", _first_present(_END_OF_TURN, token_ids))
    eom = role("eom", _first_present(_END_OF_MESSAGE, token_ids))
    ends = _find_fill_ends(metadata, token_ids, kinds)
    ends |= _find_ends_by_text(token_ids, kinds)
    for text in _SHOWN:
        if text in token_ids:
            kinds[token_ids[text]] = TokenKind.USER_DEFINED
    ends |= {token_id for token_id in (eos, eot, eom) if token_id is not None}
    _drop_texts_that_are_no_ends(ends, token_ids, kinds)
    return SpecialIds(role("bos", defaults.bos), eos, eot, eom, role("unknown", defaults.unk), frozenset(ends))


def _first_present(texts: tuple[str, ...], token_ids: Mapping[str, int]) -> int | None:
    return next((token_ids[text] for text in texts if text in token_ids), None)


def _find_fill_ends(metadata: Keys, token_ids: Mapping[str, int], kinds: bytearray) -> set[int]:
    ends: set[int] = set()
    for role in _FILL_ROLES:
        named = [token_id for key in role.keys if (token_id := read_token_id(metadata, key, len(kinds))) is not None]
        found = named[-1] if named else _first_present(role.texts, token_ids)
        if found is None:
            continue
        if not named:
            kinds[found] = TokenKind.CONTROL
        if role.is_end:
            ends.add(found)
    return ends


def fill_keys(token_ids: Mapping[str, int]) -> dict[str, int]:
    """Keys for those of these tokens that belong to fill-in-the-middle prompts: one that has a key keeps its kind."""
    found = {role.keys[0]: _first_present(role.texts, token_ids) for role in _FILL_ROLES}
    return {key: token_id for key, token_id in found.items() if token_id is not None}


def _find_ends_by_text(token_ids: Mapping[str, int], kinds: bytearray) -> set[int]:
    texts = (*_END_OF_TURN, *_END_OF_MESSAGE, *_OTHER_ENDS)
    ends = {token_ids[text] for text in texts if text in token_ids}
    for token_id in ends:
        kinds[token_id] = TokenKind.CONTROL
    return ends


def _drop_texts_that_are_no_ends(ends: set[int], token_ids: Mapping[str, int], kinds: bytearray) -> None:
    for text, companies in _NOT_ENDS.items():
        token_id = token_ids.get(text)
        if token_id in ends and any(all(token_ids.get(other) in ends for other in others) for others in companies):
            ends.discard(token_id)
            kinds[token_id] = _KINDS_WHEN_NOT_ENDS[text]


class SpecialMatcher:
    """Cuts text at special tokens: the leftmost match first, of several there the longest.

    llama.cpp looks for the longest token in the whole text first; that differs only where one token's end is
    another's beginning. `swallowing` tokens take the white space after them along (Phi-3). Threads: any.
    """

    def __init__(self, token_ids: Mapping[str, int], swallowing: frozenset[int] = frozenset()) -> None:
        self._texts = PrefixTexts(token_ids)
        self._token_ids = dict(token_ids)
        self._swallowing = swallowing
        firsts = {text[0] for text in token_ids}
        self._first = re.compile(f"[{''.join(map(re.escape, sorted(firsts)))}]") if firsts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Texts and token ids in order; no empty texts."""
        start = 0
        while (found := self._find(text, start)) is not None:
            position, end, token_id = found
            if position > start:
                yield text[start:position]
            yield token_id
            start = _skip_spaces(text, end) if token_id in self._swallowing else end
        if start < len(text):
            yield text[start:]

    def _find(self, text: str, start: int) -> tuple[int, int, int] | None:
        """The next match: where it begins, where it ends, which token it is."""
        while self._first is not None and (candidate := self._first.search(text, start)):
            start = candidate.start()
            found = self._texts.longest_at(text, start)
            if found is not None:
                return start, start + len(found), self._token_ids[found]
            start += 1
        return None


_SPACES = re.compile(r"[ \t\n\v\f\r]*")


def _skip_spaces(text: str, start: int) -> int:
    match = _SPACES.match(text, start)
    return start if match is None else match.end()


def find_swallowing(metadata: TokenizerMetadata, special_ids: Mapping[str, int]) -> frozenset[int]:
    """Tokens that take the white space after them along, known only by the model's name: GGUF has no key for it."""
    name = (metadata.text("general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    keep = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(token_id for text, token_id in special_ids.items() if text not in keep)


def special_texts(token_ids: Mapping[str, int], kinds: bytearray, *, with_control: bool) -> dict[str, int]:
    """The tokens to find in text: user-defined ones always, control and unknown ones on demand."""
    if not with_control:
        return ids_of_kinds(token_ids, kinds, TokenKind.USER_DEFINED)
    return ids_of_kinds(token_ids, kinds, TokenKind.USER_DEFINED, TokenKind.CONTROL, TokenKind.UNKNOWN)
