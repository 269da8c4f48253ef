"""llama.cpp's tokenizer, through the server inside the xllamacpp wheel: 0.2 ms a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.llama_cpp_server import LlamaCppServer, plain_params

_CONTEXT_TOKENS = 64  # nothing is computed


class LlamaCppTokens(LlamaCppServer):
    """One model's `/tokenize`."""

    def __init__(self, path: Path) -> None:
        super().__init__(plain_params(path, _CONTEXT_TOKENS))

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [int(token) for token in self._tokenize(text, add_special, parse_special, with_pieces=False)]

    def pieces(self, text: str) -> list[tuple[int, bytes]]:
        """Each token with the bytes it stands for; control tokens with their names."""
        tokens = self._tokenize(text, False, True, with_pieces=True)
        return [(token["id"], _piece_bytes(token["piece"])) for token in tokens]

    def _tokenize(self, text: str, add_special: bool, parse_special: bool, *, with_pieces: bool) -> list[Any]:
        answer = self._post(
            "/tokenize",
            content=text,
            add_special=add_special,
            parse_special=parse_special,
            with_pieces=with_pieces,
        )
        tokens = answer["tokens"]
        assert isinstance(tokens, list)
        return tokens


def _piece_bytes(piece: str | list[int]) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(byte % 256 for byte in piece)
