"""Text to token ids and back, from a tokenizer.json, with the ids transformers gives: the same library reads it.

A tokenizer.json is a stranger's: its size is bounded, and what its expressions cost is not. Source: the class
`TokenizersBackend` of transformers, for what the files beside it change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from pipo.base.errors import MalformedFile, UnsupportedModel, UsageError
from pipo.formats.hf_text import AddedText, HfText
from pipo.formats.json_object import read_bytes
from pipo.text.detokenizer import IncrementalDetokenizer
from pipo.text.hf_decoders import TokenDecoder, read_decoder
from pipo.text.special_tokens import DefaultIds, SpecialIds, find_special_ids
from pipo.text.tokenizer import PIECE_CHARS, refuse_surrogates, too_many
from pipo.text.vocabulary import TokenKind

MAX_TOKENS = 1 << 22
_CACHED_WORDS = 8192
_HIDDEN = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.UNDEFINED})


class HfTokenizer:
    """One model's tokenizer. Threads: any; one text is encoded at a time.

    `encode` gives what `transformers` does, normalisation included, so that `decode` need not invert it. Special tokens
    are hidden in text, as `skip_special_tokens` has it.
    """

    def __init__(self, engine: Engine, files: HfText, decoder: TokenDecoder) -> None:
        self._engine = engine
        self._decoder = decoder
        self._lock = threading.Lock()  # of the engine's switch for special tokens
        self._kinds, added = _kinds_of(engine, files.vocab_size)
        self.special_ids: SpecialIds = _special_ids(engine, files, self._kinds, added)
        self.end_ids = self.special_ids.ends
        texts = (engine.id_to_token(i) for i in range(files.vocab_size))
        self.longest_token_bytes = max((len(text.encode()) for text in texts if text is not None), default=1)

    @classmethod
    def from_files(cls, files: HfText) -> HfTokenizer:
        """Raises MalformedFile, UnsupportedModel, ReadFailed."""
        if files.vocab_size > MAX_TOKENS:
            raise UnsupportedModel(f"a vocabulary of {files.vocab_size} tokens, at most {MAX_TOKENS} can be")
        engine = _build(files)
        state = engine.decoder.__getstate__() if engine.decoder is not None else None
        return cls(engine, files, read_decoder(state))

    @property
    def name(self) -> str:
        return f"tokenizer.json ({type(self._engine.model).__name__})"

    @property
    def engine(self) -> Engine:
        """The library's own tokenizer, to look at."""
        return self._engine

    @property
    def kinds(self) -> bytes:
        """A TokenKind for each row of the model."""
        return bytes(self._kinds)

    @property
    def vocab_size(self) -> int:
        return int(self._engine.get_vocab_size(with_added_tokens=True))

    @property
    def prefixes_space(self) -> bool:
        """Whether `encode` puts a space before text, which `decode` takes away."""
        return self._decoder.drops_space

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """As `Tokenizer.encode`. Raises UsageError where the text names a token that the model has no row for."""
        refuse_surrogates(text)
        ids = self._encode(text, parse_special=parse_special, add_special=add_special)
        beyond = next((i for i in ids if i >= len(self._kinds)), None)
        if beyond is not None:
            token = self._engine.id_to_token(beyond)
            raise UsageError(f"the text has token {beyond} ({token!r:.40}), the model has {len(self._kinds)}")
        return ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template, which brings the begin token itself."""
        return self.encode(rendered, add_special=False, parse_special=True)

    @property
    def begin_ids(self) -> list[int]:
        """What `encode` puts before text."""
        bare, whole = (self._encode("a", parse_special=False, add_special=adds) for adds in (False, True))
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def encode_part(self, text: str, *, is_first: bool = False) -> list[int]:
        """As `Tokenizer.encode_part`. Where a space is put before text, a part that is not the first has to begin with
        one.
        """
        prefixed = self.prefixes_space and not is_first
        return self._encode(text.removeprefix(" ") if prefixed else text, parse_special=False)

    def is_longer(self, text: str, num_tokens: int, *, parse_special: bool) -> bool:
        """As `Tokenizer.is_longer`."""
        pieces = (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))
        return too_many(text, num_tokens, (len(self._encode(p, parse_special=parse_special)) for p in pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def detokenizer(
        self, after: Sequence[int], shown: frozenset[int] = frozenset(), *, keeps_space: bool = False
    ) -> IncrementalDetokenizer:
        """For tokens that are generated one by one after the tokens `after`."""
        return IncrementalDetokenizer(self, after, shown, keeps_space=keeps_space)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in text; of a special token its name. Raises UsageError where there is none."""
        text = self.token_text(token_id)
        return text.encode() if self._kinds[token_id] == TokenKind.CONTROL else self._decoder.token_bytes(text)

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it. Raises UsageError where there is none."""
        text = self._engine.id_to_token(token_id) if 0 <= token_id < len(self._kinds) else None
        if text is None:
            raise UsageError(f"there is no token {token_id}, the vocabulary has {self.vocab_size} tokens")
        return str(text)

    def spellings(self) -> list[bytes]:
        """`token_text` of every row; empty where no token has it."""
        return [(self._engine.id_to_token(i) or "").encode() for i in range(len(self._kinds))]

    def is_hidden(self, token_id: int) -> bool:
        """Whether a token is not shown as text: special ones, and ids the vocabulary lacks."""
        return not 0 <= token_id < len(self._kinds) or self._kinds[token_id] in _HIDDEN

    def _encode(self, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
        with self._lock:
            self._engine.encode_special_tokens = not parse_special
            return list(self._engine.encode(text, add_special_tokens=add_special).ids)


def _build(files: HfText) -> Engine:
    path = files.tokenizer_path
    raw = read_bytes(path, files.tokenizer_size.num_bytes)
    try:
        engine = Engine.from_buffer(raw)
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":  # the library's own crash
            raise
        raise MalformedFile(f"{path}: is no tokenizer: {error!s:.200}", hint="download the file again") from None
    if isinstance(engine.model, BPE):
        if engine.model.dropout:
            raise UnsupportedModel(f"{path}: drops merges at random, which is for training")
        engine.model._resize_cache(_CACHED_WORDS)
    known = _specials_of(engine)
    engine.add_tokens([_added_token(each, is_special=each.special or each.content in known) for each in files.added])
    known = _specials_of(engine)
    named = [text for text in files.specials if text not in known and engine.token_to_id(text) is not None]
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named])
    engine.no_truncation()
    engine.no_padding()
    return engine


def _specials_of(engine: Engine) -> set[str]:
    return {token.content for token in engine.get_added_tokens_decoder().values() if token.special}


def _added_token(text: AddedText, *, is_special: bool) -> AddedToken:
    flags = {"single_word": text.single_word, "lstrip": text.lstrip, "rstrip": text.rstrip}
    return AddedToken(text.content, normalized=text.normalized, special=is_special, **flags)


def _kinds_of(engine: Engine, vocab_size: int) -> tuple[bytearray, dict[str, int]]:
    """A TokenKind for each row of the model, and the ids of added tokens."""
    kinds = bytearray(
        TokenKind.UNDEFINED if engine.id_to_token(i) is None else TokenKind.NORMAL for i in range(vocab_size)
    )
    added = {}
    for token_id, token in engine.get_added_tokens_decoder().items():
        if token_id < vocab_size:
            kinds[token_id] = TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED
            added[token.content] = token_id
    return kinds, added


def _special_ids(engine: Engine, files: HfText, kinds: bytearray, added: dict[str, int]) -> SpecialIds:
    """Roles as the files name them, ends also by the texts of added tokens."""

    def id_of(token: str | int | None) -> int | None:
        token_id = engine.token_to_id(token) if isinstance(token, str) else token
        return token_id if token_id is not None and 0 <= token_id < files.vocab_size else None

    roles = _Roles({"bos": id_of(files.bos), "eos": id_of(files.eos)})
    found = find_special_ids(roles, added, kinds, DefaultIds())
    return SpecialIds(found.bos, found.eos, found.eot, found.eom, found.unk, found.ends | files.ends)


class _Roles:
    """The ids of roles, under the keys of GGUF."""

    def __init__(self, ids: dict[str, int | None]) -> None:
        self._ids = {f"tokenizer.ggml.{role}_token_id": token_id for role, token_id in ids.items()}

    def get(self, key: str) -> object | None:
        return self._ids.get(key)
