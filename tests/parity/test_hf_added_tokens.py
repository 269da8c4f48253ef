"""Tokens that tokenizer_config.json adds, or has in another form than tokenizer.json: transformers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipo.formats.hf_text import read_text_side
from pipo.text.hf_tokenizer import HfTokenizer
from tests.support.hf_bytes import VOCAB, write_folder

Flags = dict[str, bool] | None
TEXTS = ("a<think> b", "a <think>b", "a<think>\n\n<tool>  b", "x <tool>y<tool>", "<think><think> ")


def added(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


@pytest.mark.parametrize("in_tokenizer", [{}, {"rstrip": True}, {"special": True}, None])
@pytest.mark.parametrize("in_settings", [{"special": True, "rstrip": True}, {"lstrip": True, "special": False}, None])
def test_ids_and_text(
    in_tokenizer: dict[str, bool] | None, in_settings: dict[str, bool] | None, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    path, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    table = json.loads(path.read_text())
    first = 300  # rows of the model that the vocabulary leaves free
    table["added_tokens"] = [each for each in table["added_tokens"] if each["id"] < first]
    table["model"]["vocab"] = {text: i for text, i in table["model"]["vocab"].items() if i < first}
    table["model"]["merges"] = []
    if in_tokenizer is not None:
        table["added_tokens"].append({"id": first, "special": False, **added("<think>", **in_tokenizer)})
    path.write_text(json.dumps(table))
    told = json.loads(settings.read_text()) if settings.exists() else {}
    if in_settings is not None:
        told["added_tokens_decoder"] = {
            str(first): added("<think>", **in_settings),
            str(first + 1): added("<tool>", special=False),
        }
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **told}))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = HfTokenizer.from_files(read_text_side(tmp_path, tmp_path / "config.json", VOCAB))
    for text in TEXTS:
        ids = ours.encode(text, add_special=False, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for token_id in ids:
            is_shown = bool(theirs.decode([token_id], skip_special_tokens=True))
            assert ours.is_hidden(token_id) is not is_shown, theirs.convert_ids_to_tokens(token_id)
