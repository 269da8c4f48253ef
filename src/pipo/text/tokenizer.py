"""Text to token ids and back, from a GGUF file's metadata, with the ids llama.cpp gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipo.base.errors import MalformedFile, UnsupportedModel, UsageError
from pipo.text.byte_pairs import BytePairs, read_merges
from pipo.text.detokenizer import IncrementalDetokenizer
from pipo.text.pretokenizers import PreTokenizer, find_pre_tokenizer
from pipo.text.sentence_pieces import SentencePieces
from pipo.text.special_tokens import (
    DefaultIds,
    SpecialIds,
    SpecialMatcher,
    find_special_ids,
    find_swallowing,
    special_texts,
)
from pipo.text.vocabulary import (
    TokenizerMetadata,
    TokenKind,
    byte_of,
    read_byte_tokens,
    read_kinds,
    read_scores,
    read_token_ids,
)

__all__ = ["IncrementalDetokenizer", "SpecialIds", "TextModel", "Tokenizer", "TokenizerMetadata"]

_log = logging.getLogger(__name__)

_MODEL_KEY = "tokenizer.ggml.model"
_PRE_TOKENIZER_KEY = "tokenizer.ggml.pre"
_ADD_BOS_KEY = "tokenizer.ggml.add_bos_token"
_ADD_EOS_KEY = "tokenizer.ggml.add_eos_token"
_ADD_SPACE_KEY = "tokenizer.ggml.add_space_prefix"
_SENTENCE_PIECE_MODEL = "llama"
_DEFAULT_IDS = {  # by tokenizer model; these are all that are implemented
    _SENTENCE_PIECE_MODEL: DefaultIds(bos=1, eos=2, unk=0),
    "gpt2": DefaultIds(),
    "gemma4": DefaultIds(),
}
PIECE_CHARS = 8192  # of a long text, encoded apart to count its tokens
_HIDDEN = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.UNUSED, TokenKind.UNDEFINED})


class TextModel(Protocol):
    """Encodes text in which no special token is left to be found."""

    def encode(self, text: str) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def plain_bytes(self, text: str) -> bytes:
        """What a normal token of this text stands for."""


@dataclass(frozen=True, slots=True)
class _Wrapping:
    """What is put around text: `prefixes_space` where it begins and after each special token."""

    adds_bos: bool
    adds_eos: bool
    prefixes_space: bool


class Tokenizer:
    """One model's tokenizer. Threads: any, it does not change.

    `decode` inverts `encode` for text without special tokens, but for bytes that a model lacks (see BytePairs) and for
    ▁, which sentence pieces take for a space. No Unicode normalisation, no cleaning of spaces.
    """

    def __init__(
        self,
        model: TextModel,
        kinds: bytearray,
        special_ids: SpecialIds,
        matchers: tuple[SpecialMatcher, SpecialMatcher],
        wrapping: _Wrapping,
        name: str = "",
    ) -> None:
        self.name = name
        self._model = model
        self._kinds = bytes(kinds)
        self.special_ids = special_ids
        self.end_ids = special_ids.ends
        self._user_defined, self._special = matchers
        self._wrapping = wrapping
        self.longest_token_bytes = max(len(model.token_text(i).encode()) for i in range(len(kinds)))

    @classmethod
    def from_metadata(cls, metadata: TokenizerMetadata) -> Tokenizer:
        """Raises MalformedFile (naming the key) and UnsupportedModel.

        Cost: 0.1 s and 14 MB (22 MB while it is built) for 49k byte-pair tokens, 0.6 s and 72 MB (94 MB) for 128k;
        5 MB (7 MB) for 32k sentence pieces. A third of what stays is free inside malloc, which trimming returns.
        """
        name = _read_model_name(metadata)
        token_ids = read_token_ids(metadata)
        kinds = read_kinds(metadata, len(token_ids))
        special_ids = find_special_ids(metadata, token_ids, kinds, _DEFAULT_IDS[name])
        matchers = _matchers(metadata, token_ids, kinds)
        if name == _SENTENCE_PIECE_MODEL:
            wrapping = _read_wrapping(metadata, special_ids, adds_bos=True, prefixes_space=True)
            scores = read_scores(metadata, len(kinds))
            model: TextModel = SentencePieces(token_ids, kinds, scores, special_ids.unk)
        else:
            read_byte_tokens(token_ids, kinds)  # only to refuse misspelled ones
            pre_tokenizer = _read_pre_tokenizer(metadata, name)
            wrapping = _read_wrapping(metadata, special_ids, adds_bos=pre_tokenizer.adds_bos, prefixes_space=False)
            model = BytePairs(token_ids, read_merges(metadata), pre_tokenizer)
        pre = metadata.text(_PRE_TOKENIZER_KEY)
        return cls(model, kinds, special_ids, matchers, wrapping, f"{name} ({pre:.80})" if pre else name)

    @property
    def vocab_size(self) -> int:
        return len(self._kinds)

    @property
    def prefixes_space(self) -> bool:
        """Whether `encode` puts a space before text, which `decode` takes away."""
        return self._wrapping.prefixes_space

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.

        `add_special` puts the model's begin and end tokens around it, where it has been trained with them.
        `parse_special` reads the texts of control tokens as these tokens; without it a user's "<|im_end|>" is plain
        text. User-defined tokens are found either way. Raises UsageError for a lone surrogate, which is not text.
        Cost: under 1 s for 1 MB; byte pairs leave the interpreter free meanwhile, sentence pieces do not.
        """
        refuse_surrogates(text)
        adds_bos = add_special and self._wrapping.adds_bos
        adds_eos = add_special and self._wrapping.adds_eos
        ids = self._id_if(adds_bos, self.special_ids.bos)
        ids += self._encode_parts((self._special if parse_special else self._user_defined).split(text))
        return ids + self._id_if(adds_eos, self.special_ids.eos)

    @property
    def begin_ids(self) -> list[int]:
        """What `encode` puts before text: the begin token, where the model has been trained with one."""
        return self._id_if(self._wrapping.adds_bos, self.special_ids.bos)

    def encode_part(self, text: str, *, is_first: bool = False) -> list[int]:
        """Token ids of a part of a plain text, cut where tokens end; only the first one has its space prefixed."""
        return self._encode_parts(self._user_defined.split(text), begins=is_first)

    def is_longer(self, text: str, num_tokens: int, *, parse_special: bool) -> bool:
        """Whether `text` certainly has more than `num_tokens` tokens, found without the memory to encode all of it.

        Pieces are counted until there are a quarter too many: a cut changes the tokens beside it, never every fourth.
        False may be wrong by that quarter.
        """
        return too_many(text, num_tokens, self._counts(text, parse_special=parse_special))

    def _counts(self, text: str, *, parse_special: bool) -> Iterator[int]:
        for part in (self._special if parse_special else self._user_defined).split(text):
            size = 1 if isinstance(part, int) else len(part)
            for start in range(0, size, PIECE_CHARS):
                yield 1 if isinstance(part, int) else self._num_tokens(part[start : start + PIECE_CHARS])

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template: special tokens are read, the begin token is there exactly once."""
        ids = self.encode(rendered, add_special=False, parse_special=True)
        bos = self._id_if(self._wrapping.adds_bos, self.special_ids.bos)
        return ids if ids[: len(bos)] == bos else bos + ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def detokenizer(
        self, after: Sequence[int], shown: frozenset[int] = frozenset(), *, keeps_space: bool = False
    ) -> IncrementalDetokenizer:
        """For tokens that are generated one by one after the tokens `after`."""
        return IncrementalDetokenizer(self, after, shown, keeps_space=keeps_space)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in text; of a control token its name. Raises UsageError where there is none."""
        text = self.token_text(token_id)
        kind = self._kinds[token_id]
        if kind == TokenKind.NORMAL:
            return self._model.plain_bytes(text)
        if kind == TokenKind.BYTE:
            return bytes([byte_of(text)])
        return text.encode()

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it. Raises UsageError where there is none."""
        if not 0 <= token_id < self.vocab_size:
            raise UsageError(f"there is no token {token_id}, the vocabulary has {self.vocab_size} tokens")
        return self._model.token_text(token_id)

    def is_hidden(self, token_id: int) -> bool:
        """Whether a token is not shown as text: control, unknown and unused ones, and ids the vocabulary lacks."""
        return not 0 <= token_id < self.vocab_size or self._kinds[token_id] in _HIDDEN

    def _num_tokens(self, text: str) -> int:
        return len(self._model.encode(text))

    def _encode_parts(self, parts: Iterator[str | int], *, begins: bool = True) -> list[int]:
        ids: list[int] = []
        is_after_special = begins
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = " " if is_after_special and self._wrapping.prefixes_space else ""
                ids += self._model.encode(prefix + part)
            is_after_special = isinstance(part, int)
        return ids

    @staticmethod
    def _id_if(is_wanted: bool, token_id: int | None) -> list[int]:
        return [token_id] if is_wanted and token_id is not None else []


def _read_model_name(metadata: TokenizerMetadata) -> str:
    name = metadata.text(_MODEL_KEY)
    if name is None:
        raise MalformedFile(f"key {_MODEL_KEY!r} is missing")
    if name not in _DEFAULT_IDS:
        raise UnsupportedModel(
            f"the tokenizer {name!r:.80} (key {_MODEL_KEY!r}) is not implemented",
            hint=f"known are {', '.join(_DEFAULT_IDS)}",
        )
    return name


def _matchers(
    metadata: TokenizerMetadata, token_ids: dict[str, int], kinds: bytearray
) -> tuple[SpecialMatcher, SpecialMatcher]:
    """Of user-defined tokens, and of these with control tokens."""
    special = special_texts(token_ids, kinds, with_control=True)
    swallowing = find_swallowing(metadata, special)
    user_defined = special_texts(token_ids, kinds, with_control=False)
    return SpecialMatcher(user_defined, swallowing), SpecialMatcher(special, swallowing)


def _read_pre_tokenizer(metadata: TokenizerMetadata, model_name: str) -> PreTokenizer:
    if model_name != "gpt2":
        return find_pre_tokenizer(model_name)
    name = metadata.text(_PRE_TOKENIZER_KEY)
    if not name:
        _log.warning("key=%s is=missing using=default effect=worse_answers", _PRE_TOKENIZER_KEY)
    return find_pre_tokenizer(name or "default")


def _read_wrapping(
    metadata: TokenizerMetadata, special_ids: SpecialIds, *, adds_bos: bool, prefixes_space: bool
) -> _Wrapping:
    def flag(key: str, default: bool) -> bool:
        value = metadata.flag(key)
        return default if value is None else value

    wrapping = _Wrapping(
        flag(_ADD_BOS_KEY, adds_bos),
        flag(_ADD_EOS_KEY, False),
        prefixes_space and flag(_ADD_SPACE_KEY, True),
    )
    if wrapping.adds_bos and special_ids.bos is None:
        raise MalformedFile(f"key {_ADD_BOS_KEY!r} wants a begin token, 'tokenizer.ggml.bos_token_id' names none")
    if wrapping.adds_eos and special_ids.eos is None:
        raise MalformedFile(f"key {_ADD_EOS_KEY!r} wants an end token, 'tokenizer.ggml.eos_token_id' names none")
    return wrapping


def too_many(text: str, num_tokens: int, counts: Iterable[int]) -> bool:
    """Whether `counts`, of the tokens of the text's pieces, add up to a quarter more than `num_tokens`."""
    if len(text) * 4 <= num_tokens:  # a character is four bytes at most, and a token at least one
        return False
    num_found, limit = 0, num_tokens + num_tokens // 4 + 64
    for count in counts:
        num_found += count
        if num_found > limit:
            return True
    return False


def refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            hint="half of a UTF-16 pair is not a character: check where the text was cut or decoded",
        ) from None
