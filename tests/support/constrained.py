"""Constrained answers without a model: logits at random, with a leaning towards what ends things."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo.formats.hf_text import read_text_side
from pipo.generation.answer import Answer
from pipo.generation.constraints import Grammars
from pipo.generation.request import ConstraintSpec, FinishReason, SamplingParams
from pipo.text.contract import ModelTokenizer
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.tokenizer_files import write_engine
from tests.support.vocabularies import byte_pair_metadata, sentence_piece_metadata

TOKENIZERS = ("byte pairs", "sentence pieces", "llama3", "llama2", "qwen", "gemma", "unigram")
_PADDING = 7  # rows of the model that no token has


def tokenizer_of(kind: str, folder: Path) -> tuple[ModelTokenizer, int]:
    """One of TOKENIZERS, and how many rows a model of it would have."""
    if kind in ("byte pairs", "sentence pieces"):
        metadata = byte_pair_metadata() if kind == "byte pairs" else sentence_piece_metadata()
        tokenizer = Tokenizer.from_metadata(metadata)
        return tokenizer, tokenizer.vocab_size + _PADDING
    write_engine(folder, kind)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 32
    (folder / "config.json").write_text(json.dumps({"vocab_size": size, "eos_token_id": 2}))
    return HfTokenizer.from_files(read_text_side(folder, folder / "config.json", size)), size


def random_logits(tokenizer: ModelTokenizer, num_rows: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Every token may be the likeliest; those that close something are so more often."""
    rng = np.random.default_rng(seed)
    leaning = np.zeros(num_rows, np.float32)
    for token_id in range(tokenizer.vocab_size):
        text = b"" if tokenizer.is_hidden(token_id) else tokenizer.token_bytes(token_id)
        leaning[token_id] = 3 * any(mark in text for mark in (b'"', b"}", b"]"))
    leaning[sorted(tokenizer.end_ids)] = 3
    while True:
        yield leaning + rng.normal(0, 2, num_rows).astype(np.float32)


def answer_at_random(
    tokenizer: ModelTokenizer,
    num_rows: int,
    grammars: Grammars,
    spec: ConstraintSpec,
    seed: int,
    max_tokens: int = 400,
    shown: frozenset[int] = frozenset(),
    **params: Any,
) -> tuple[str, FinishReason, list[int]]:
    """Text, why it ended, and the tokens."""
    settings = SamplingParams(**{"seed": seed, "temperature": 1.0, **params})
    detokenizer = tokenizer.detokenizer([], shown, keeps_space=True)
    answer = Answer(settings, max_tokens, tokenizer.end_ids, detokenizer, grammars.constraint(spec))
    text, history = "", []
    for logits in random_logits(tokenizer, num_rows, seed):
        piece = answer.take(logits, history)
        text += piece.text
        if piece.token is not None:
            history.append(piece.token.token_id)
        if piece.finish is not None:
            return text, piece.finish, history
    raise AssertionError
