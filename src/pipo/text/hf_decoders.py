"""What a token stands for, by the decoder of its tokenizer.json: the few kinds that text models have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipo.base.errors import UnsupportedModel
from pipo.text.byte_pairs import bytes_of_letters
from pipo.text.vocabulary import byte_of

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE_MARK = "▁"


@dataclass(frozen=True, slots=True)
class TokenDecoder:
    """`is_byte_level` tokens are spelled in GPT-2's letters for bytes; others may have a `mark` for a space, and single
    bytes as <0x0A>. `drops_space`: one that begins a text is not part of it.
    """

    is_byte_level: bool = False
    mark: str | None = None
    has_byte_tokens: bool = False
    drops_space: bool = False

    def token_bytes(self, text: str) -> bytes:
        if self.has_byte_tokens and _BYTE_TOKEN.fullmatch(text):
            return bytes([byte_of(text)])
        if self.is_byte_level:
            return bytes_of_letters(text)
        return (text.replace(self.mark, " ") if self.mark else text).encode()


def read_decoder(state: bytes | None) -> TokenDecoder:
    """From the library's own description of it. Raises UnsupportedModel for other kinds, by name."""
    if state is None:
        raise UnsupportedModel("the tokenizer has no decoder: how tokens become text is not said")
    steps = list(_steps(json.loads(state)))
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return TokenDecoder(is_byte_level=True)
    mark, has_byte_tokens, drops_space = None, False, False
    for step in steps:
        match step["type"]:
            case "Replace" if step.get("pattern") == {"String": _SPACE_MARK} and step.get("content") == " ":
                mark = _SPACE_MARK
            case "Metaspace" if isinstance(step.get("replacement"), str):
                mark, drops_space = str(step["replacement"]), step.get("prepend_scheme") != "never"
            case "ByteFallback":
                has_byte_tokens = True
            case "Fuse":
                pass
            case "Strip" if step.get("content") == " " and step.get("start") == 1 and step.get("stop") == 0:
                drops_space = True
            case kind:
                raise UnsupportedModel(f"the tokenizer's decoder {kind!r:.80} is not implemented as this model has it")
    return TokenDecoder(False, mark, has_byte_tokens, drops_space)


def _steps(decoder: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    parts = decoder.get("decoders")
    if decoder.get("type") != "Sequence" or not isinstance(parts, list):
        yield decoder
        return
    for part in parts:
        yield from _steps(part)
