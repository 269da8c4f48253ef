"""The tokenizer of a tokenizer.json as the keys of a GGUF, with the same ids, or a refusal.

What is about to be written is built into a tokenizer first, and encodes a corpus of texts as the folder's own does.
llama.cpp's converter takes scores of sentence pieces from tokenizer.model, which many folders lack; here they are made
from the order of the merges, where that order can be said by scores at all.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.models import BPE

from pipo.base.errors import MalformedFile, UnsupportedModel, UsageError
from pipo.formats.gguf_writer import KeyValue, entry
from pipo.formats.hf_text import HfText
from pipo.text.byte_pairs import MERGES_KEY
from pipo.text.hf_parts import Spelling, read_spelling
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.piece_scores import Merge, NoScoresError, doubtful_texts, scores_of
from pipo.text.probes import probe_texts
from pipo.text.sentence_pieces import SPACE_MARK
from pipo.text.special_tokens import fill_keys
from pipo.text.tokenizer import Tokenizer
from pipo.text.vocabulary import KINDS_KEY, SCORES_KEY, TOKENS_KEY, TokenKind

_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_TEXT_KINDS = (TokenKind.NORMAL, TokenKind.USER_DEFINED)
_SHOWN = 6  # of many, in a message
_AS_IT_IS = "the folder itself runs as it is"


@dataclass(frozen=True, slots=True)
class GgufText:
    """`entries` of the file's header. `losses`: what of the tokenizer no GGUF can say, for people."""

    entries: tuple[bytes, ...]
    losses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """What of the folder's tokenizer is needed once it is gone, with what it gave for each probe."""

    name: str
    tokens: list[str]
    kinds: bytearray
    merges: list[Merge]
    scores: list[float] | NoScoresError  # of sentence pieces; byte pairs have none
    spelling: Spelling
    shared: Mapping[str, KeyValue]  # keys that are the same whatever the model is
    ends: frozenset[int]
    ids: list[tuple[str, bool, list[int]]]  # text, whether special tokens were read, ids
    texts: list[bytes | None]  # of tokens


def gguf_text_of(files: HfText, name: str) -> GgufText:
    """Raises UnsupportedModel naming what a GGUF cannot say, or a text that would get other ids; MalformedFile.

    Cost: two seconds for 49k tokens, and the memory of both tokenizers, one after the other.
    """
    source = _read(files, name)
    refusal: UnsupportedModel | None = None
    for keys in _candidates(source):
        try:
            tokenizer = _checked(source, keys)
        except UnsupportedModel as error:
            refusal = error
            continue
        return GgufText(tuple(entry(key, value) for key, value in keys.items()), tuple(_losses(source, tokenizer)))
    assert refusal is not None
    raise refusal


def _read(files: HfText, name: str) -> _Source:
    hf = HfTokenizer.from_files(files)
    engine = hf.engine
    if not isinstance(engine.model, BPE):
        raise UnsupportedModel(
            f"{name}: its tokenizer is {type(engine.model).__name__}, a GGUF gets byte pairs (BPE) only", hint=_AS_IT_IS
        )
    state: Mapping[str, Any] = json.loads(engine.model.__getstate__())
    if state["continuing_subword_prefix"] or state["end_of_word_suffix"]:
        raise UnsupportedModel(f"{name}: its tokens have prefixes or suffixes, which a GGUF cannot say", hint=_AS_IT_IS)
    ignores_merges = bool(state["ignore_merges"])
    spelling = read_spelling(engine.normalizer, engine.pre_tokenizer, ignores_merges=ignores_merges, name=name)
    tokens = [engine.id_to_token(i) or f"[PAD{i}]" for i in range(files.vocab_size)]
    kinds = _kinds(hf, tokens, state)
    if spelling.pre is None and (ignores_merges or not set(_BYTE_TOKENS) <= set(tokens)):
        raise UnsupportedModel(f"{name}: its tokenizer has marks for spaces, but no token for every byte")
    merges = [_pair(merge) for merge in state["merges"]]
    shared = _shared_keys(hf, files, name, tokens, kinds)
    unknown = state["unk_token"]
    if unknown is not None and (unknown_id := engine.token_to_id(unknown)) is not None:
        shared["tokenizer.ggml.unknown_token_id"] = unknown_id
    scores = _scores(tokens, kinds, merges, spelling)
    doubts = (t.replace(SPACE_MARK, " ") for t in doubtful_texts(merges)) if isinstance(scores, list) else ()
    return _Source(
        name, tokens, kinds, merges, scores, spelling, shared, hf.end_ids,
        list(_encoded(hf, chain(_probes(hf, tokens, kinds, spelling), doubts))),
        [_text_of(hf, i, kinds) for i in range(len(tokens))],
    )  # fmt: skip


def _scores(
    tokens: Sequence[str], kinds: bytearray, merges: Sequence[Merge], spelling: Spelling
) -> list[float] | NoScoresError:
    if spelling.pre is not None:
        return NoScoresError("words are byte pairs")
    try:
        return scores_of(tokens, kinds, merges)
    except NoScoresError as error:
        return error


def _pair(merge: str | list[str]) -> Merge:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _kinds(hf: HfTokenizer, tokens: Sequence[str], state: Mapping[str, Any]) -> bytearray:
    """As the file has them, whatever their texts are taken for."""
    kinds = bytearray(hf.kinds)
    for idx, token in hf.engine.get_added_tokens_decoder().items():
        if idx < len(kinds):
            kinds[idx] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
    bytes_ = set(_BYTE_TOKENS) if state["byte_fallback"] else set()
    for idx, text in enumerate(tokens):
        if kinds[idx] == TokenKind.UNDEFINED:
            kinds[idx] = TokenKind.UNUSED
        elif text in bytes_ and kinds[idx] == TokenKind.NORMAL:
            kinds[idx] = TokenKind.BYTE
        elif text == state["unk_token"] and state["byte_fallback"]:
            kinds[idx] = TokenKind.UNKNOWN
    return kinds


def _shared_keys(hf: HfTokenizer, files: HfText, name: str, tokens: list[str], kinds: bytearray) -> dict[str, KeyValue]:
    begin, end = _around(hf, name)
    special = hf.special_ids
    roles = {"bos": begin if begin is not None else special.bos, "eos": end if end is not None else special.eos}
    roles |= {"eot": special.eot, "eom": special.eom}
    keys: dict[str, KeyValue] = {TOKENS_KEY: tokens, KINDS_KEY: np.frombuffer(kinds, np.uint8).astype(np.int32)}
    keys |= {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items() if i is not None}
    keys |= fill_keys({text: i for i, text in enumerate(tokens) if kinds[i] == TokenKind.USER_DEFINED})
    keys |= {"tokenizer.ggml.add_bos_token": begin is not None, "tokenizer.ggml.add_eos_token": end is not None}
    if files.chat_template is not None:
        keys["tokenizer.chat_template"] = files.chat_template
    return keys


def _around(hf: HfTokenizer, name: str) -> tuple[int | None, int | None]:
    """The tokens that `encode` puts before text and after it."""
    bare, whole = (hf.encode("a", add_special=adds, parse_special=False) for adds in (False, True))
    before = hf.begin_ids
    after = whole[len(before) + len(bare) :]
    if len(before) > 1 or len(after) > 1 or whole != before + bare + after:
        raise UnsupportedModel(
            f"{name}: its tokenizer puts {before} before text and {after} after it, a GGUF has one token each",
            hint=_AS_IT_IS,
        )
    return before[0] if before else None, after[0] if after else None


def _probes(hf: HfTokenizer, tokens: Sequence[str], kinds: bytearray, spelling: Spelling) -> Iterator[str]:
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED)]
    normal = [hf.token_bytes(i).decode(errors="ignore") for i, kind in enumerate(kinds) if kind == TokenKind.NORMAL]
    for text in probe_texts(special, normal):
        yield unicodedata.normalize("NFC", text) if spelling.normalises else text


def _encoded(hf: HfTokenizer, probes: Iterable[str]) -> Iterator[tuple[str, bool, list[int]]]:
    """Probes with their ids. One that needs a token without a row is none."""
    for probe in probes:
        for parse_special in (False, True):
            try:
                yield probe, parse_special, hf.encode(probe, add_special=True, parse_special=parse_special)
            except UsageError:
                continue


def _text_of(tokenizer: HfTokenizer | Tokenizer, token_id: int, kinds: bytearray) -> bytes | None:
    """What a token stands for; None for those that are spelled as they are."""
    return tokenizer.token_bytes(token_id) if kinds[token_id] in (TokenKind.NORMAL, TokenKind.BYTE) else None


def _candidates(source: _Source) -> Iterator[dict[str, KeyValue]]:
    """Ways to say the same, the usual one first. Raises UnsupportedModel where there is none."""
    if any(" " in part for merge in source.merges for part in merge):
        raise UnsupportedModel(f"{source.name}: merges with spaces in them cannot be written", hint=_AS_IT_IS)
    merges = {MERGES_KEY: [f"{left} {right}" for left, right in source.merges]}
    if source.spelling.pre is not None:
        yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": source.spelling.pre, **source.shared, **merges}
        return
    prefixes, spans_lines = source.spelling.prefixes_space, any(map(_spans_lines, source.merges))
    # merges by rank, with text cut at the ends of lines; llama.cpp begins such text with the begin token in any case
    are_as_gemma4s = not prefixes and not spans_lines and source.shared["tokenizer.ggml.add_bos_token"]
    if isinstance(source.scores, list):
        scores = np.asarray(source.scores, np.float32)
        own: dict[str, KeyValue] = {"tokenizer.ggml.add_space_prefix": prefixes, SCORES_KEY: scores}
        yield {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **source.shared, **own}
    elif not are_as_gemma4s:
        raise UnsupportedModel(
            f"{source.name}: the order of its merges cannot be said by scores of sentence pieces: {source.scores}",
            hint=_AS_IT_IS,
        )
    if are_as_gemma4s:
        yield {"tokenizer.ggml.model": "gemma4", **source.shared, **merges}


def _spans_lines(merge: Merge) -> bool:
    whole = "".join(merge)
    return "\n" in whole and bool(whole.strip("\n"))


def _checked(source: _Source, keys: Mapping[str, KeyValue]) -> Tokenizer:
    """What a reader makes of the keys. Raises UnsupportedModel where ids would be others."""
    try:
        tokenizer = Tokenizer.from_metadata(_Metadata({**keys, "general.name": source.name}))
    except MalformedFile as error:
        raise UnsupportedModel(f"{source.name}: its tokenizer cannot be written: {error}", hint=_AS_IT_IS) from None
    taken = [source.tokens[i] for i in _taken(source, tokenizer)]
    for text, parse_special, wanted in source.ids:
        if any(token in text for token in taken):
            continue
        found = tokenizer.encode(text, add_special=True, parse_special=parse_special)
        if found != wanted:
            raise UnsupportedModel(
                f"{source.name}: the text {text!r} has tokens {_other(found, wanted)} with tokenizer.json, "
                f"{_other(wanted, found)} with the tokenizer that a GGUF would get",
                hint=_AS_IT_IS,
            )
    for idx, wanted_text in enumerate(source.texts):
        if wanted_text is not None and not tokenizer.is_hidden(idx) and wanted_text != tokenizer.token_bytes(idx):
            raise UnsupportedModel(
                f"{source.name}: in a GGUF token {idx} would stand for {tokenizer.token_bytes(idx)!r:.80}, in "
                f"tokenizer.json it stands for {wanted_text!r:.80}",
                hint=_AS_IT_IS,
            )
    return tokenizer


def _taken(source: _Source, tokenizer: Tokenizer) -> list[int]:
    """Tokens of text that a reader takes for special ones by how they read: `</s>` in Qwen's vocabulary."""
    return [i for i, kind in enumerate(source.kinds) if kind in _TEXT_KINDS and tokenizer.is_hidden(i)]


def _losses(source: _Source, tokenizer: Tokenizer) -> Iterator[str]:
    taken, ends = frozenset(_taken(source, tokenizer)), tokenizer.end_ids
    if source.spelling.normalises:
        yield (
            "its tokenizer normalises text (NFC), which no GGUF can say: decomposed characters, as e + U+0301, get "
            "other tokens from the file"
        )
    if lacking := source.ends - ends:
        yield f"{_named(source, lacking)} end answers of the folder, but not of the file: a GGUF has no key for them"
    if taken:
        yield f"readers of a GGUF take {_named(source, taken)} for special tokens, which are text in the folder"
    if more := ends - source.ends - taken:
        yield f"{_named(source, more)} end answers of the file, but not of the folder"


def _named(source: _Source, ids: Iterable[int]) -> str:
    return ", ".join(repr(source.tokens[i]) if i < len(source.tokens) else f"token {i}" for i in sorted(ids)[:_SHOWN])


def _other(other: Sequence[int], ids: Sequence[int]) -> str:
    """Some of `ids`, from the first one that is not the other's."""
    start = next((i for i, (a, b) in enumerate(zip(other, ids, strict=False)) if a != b), min(len(other), len(ids)))
    shown = ", ".join(map(str, ids[start : start + _SHOWN]))
    return f"{'… ' if start else ''}{shown or 'no more'}{' …' if len(ids) > start + _SHOWN else ''}"


class _Metadata(dict[str, KeyValue]):
    """The keys as `Tokenizer` asks a file for them."""

    def text(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        return value if isinstance(value, bool) else None

    def strings(self, key: str) -> list[str]:
        value = self[key]
        assert isinstance(value, list)
        return value

    def array(self, key: str) -> npt.NDArray[np.generic]:
        value = self[key]
        assert isinstance(value, np.ndarray)
        return value
