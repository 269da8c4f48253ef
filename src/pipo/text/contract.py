"""What the engine asks of a model's tokenizer, whichever format it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pipo.text.detokenizer import IncrementalDetokenizer
from pipo.text.special_tokens import SpecialIds


class ModelTokenizer(Protocol):
    """One model's tokenizer. Threads: any, it does not change. `Tokenizer` says what the methods do."""

    @property
    def name(self) -> str:
        """Of its kind, for people."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes of text than this."""

    @property
    def special_ids(self) -> SpecialIds: ...

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""

    @property
    def prefixes_space(self) -> bool: ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def encode_chat(self, rendered: str) -> list[int]: ...

    @property
    def begin_ids(self) -> list[int]: ...

    def encode_part(self, text: str, *, is_first: bool = False) -> list[int]: ...

    def is_longer(self, text: str, num_tokens: int, *, parse_special: bool) -> bool: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def detokenizer(
        self, after: Sequence[int], shown: frozenset[int] = frozenset(), *, keeps_space: bool = False
    ) -> IncrementalDetokenizer: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def is_hidden(self, token_id: int) -> bool: ...
