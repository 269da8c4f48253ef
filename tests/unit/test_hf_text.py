"""Tokenizers and templates of folders: where they come from, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers

from pipo.base.errors import MalformedFile, ModelError, OverBudget, UnsupportedModel, UsageError
from pipo.base.units import MIB
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf import open_gguf
from pipo.formats.hf_text import MAX_TOKENIZER_BYTES, HfText, read_text_side
from pipo.model_file import ModelFile, tokenizer_build_bytes
from pipo.text.hf_tokenizer import HfTokenizer
from tests.support.hf_bytes import VOCAB, write_folder
from tests.support.hf_folders import byte_level_engine, edit_json
from tests.support.tokenizer_files import smollm2_json

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"


def text_of(folder: Path) -> HfText:
    return read_text_side(folder, folder / "config.json", VOCAB)


def tokenizer_of(folder: Path, change: Callable[[dict[str, Any]], None] = lambda table: None) -> HfTokenizer:
    """After a change of tokenizer.json."""
    write_folder(folder)
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    return HfTokenizer.from_files(text_of(folder))


# Templates


def test_a_template_whose_name_is_none(tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=[{"name": [], "template": "a"}])
    assert text_of(tmp_path).chat_template is None


def test_a_template_of_its_own_file_goes_first(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert text_of(tmp_path).chat_template is None
    edit_json(tmp_path / "tokenizer_config.json", chat_template=[{"name": "tools", "template": "a"}])
    assert text_of(tmp_path).chat_template is None
    edit_json(tmp_path / "tokenizer_config.json", chat_template=[{"name": "default", "template": "b"}])
    assert text_of(tmp_path).chat_template == "b"
    edit_json(tmp_path / "tokenizer_config.json", chat_template="c")
    assert text_of(tmp_path).chat_template == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert text_of(tmp_path).get("tokenizer.chat_template") == "d"


def test_a_conversation_in_the_models_template(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    model = ModelFile(tmp_path)
    ids = model.encode_chat([{"role": "user", "content": "abc"}])
    assert model.tokenizer.decode(ids) == "user\nabc" and (ids[0], ids[-1]) == (1, 2)


@pytest.mark.parametrize("value", [3, {"a": 1}, True])
def test_a_template_that_is_none(value: object, tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=value)
    with pytest.raises(MalformedFile, match=r"'chat_template' of tokenizer_config\.json"):
        text_of(tmp_path)


# Special tokens


def test_ends_are_gathered_from_all_files(tmp_path: Path) -> None:
    write_folder(tmp_path, eos_token_id=[7, 9])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 11, "temperature": 0.6}))
    tokenizer = HfTokenizer.from_files(text_of(tmp_path))
    assert tokenizer.end_ids >= {2, 7, 9, 11}
    assert (tokenizer.special_ids.bos, tokenizer.special_ids.eos) == (1, 2)


def test_ends_by_the_texts_of_added_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path, eos_token_id=5)
    edit_json(tmp_path / "tokenizer_config.json", eos_token=None)
    tokenizer = HfTokenizer.from_files(text_of(tmp_path))
    assert tokenizer.end_ids == {0, 2, 5}  # <|endoftext|>, <|im_end|>


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "__type": "AddedToken"}])
def test_a_token_stands_as_a_text_or_a_table(token: object, tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", bos_token=token)
    assert HfTokenizer.from_files(text_of(tmp_path)).special_ids.bos == 2


def test_without_tokenizer_config_ids_are_those_of_config(tmp_path: Path) -> None:
    write_folder(tmp_path, bos_token_id=2, eos_token_id=[0, 1])
    (tmp_path / "tokenizer_config.json").unlink()
    ids = HfTokenizer.from_files(text_of(tmp_path)).special_ids
    assert (ids.bos, ids.eos) == (2, 0) and ids.ends >= {0, 1}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"eos_token_id": "x"}, r"'eos_token_id' of config\.json is 'x'"),
        ("config.json", {"eos_token_id": [-1]}, r"'eos_token_id' of config\.json"),
        ("generation_config.json", {"eos_token_id": [True]}, r"'eos_token_id' of generation_config\.json"),
        ("tokenizer_config.json", {"eos_token": 3}, r"'eos_token' of tokenizer_config\.json is 3"),
        ("tokenizer_config.json", {"bos_token": {"a": 1}}, "'bos_token'"),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, "'bos_token'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "'added_tokens_decoder'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "a", "rstrip": 1}}}, "'added_tokens_dec"),
    ],
)
def test_wrong_roles(file: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    edit_json(tmp_path / file, **changes)
    with pytest.raises(MalformedFile, match=message):
        text_of(tmp_path)


# tokenizer.json


@pytest.mark.parametrize("other", [None, "tokenizer.model", "vocab.json", "tekken.json"])
def test_no_tokenizer_json(other: str | None, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if other:
        (tmp_path / other).write_text("x")
    with pytest.raises(
        UnsupportedModel, match=r"has no tokenizer\.json" + (f"; {other} alone" if other else "")
    ) as found:
        open_checkpoint(tmp_path)
    assert found.value.hint and "save_pretrained" in found.value.hint


@pytest.mark.parametrize(
    "raw",
    [b"{}", b"[]", b"nope", b"\xff\xfe", b'{"model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}', b"[" * 10**5],
)
def test_broken_tokenizers(raw: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(MalformedFile, match=r"tokenizer\.json: is no tokenizer"):
        ModelFile(tmp_path)


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(MalformedFile, match=r"tokenizer\.json: takes 64\.0 MiB, at most 64\.0 MiB can be"):
        open_checkpoint(tmp_path)


def test_dropout_is_for_training(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="drops merges at random"):
        tokenizer_of(tmp_path, lambda table: table["model"].update(dropout=0.1))


def test_padding_and_truncation_are_left_out(tmp_path: Path) -> None:
    def change(table: dict[str, Any]) -> None:
        table["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        table["padding"] = {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    tokenizer = tokenizer_of(tmp_path, change)
    assert len(tokenizer.encode("xyz" * 10, add_special=True, parse_special=True)) == 30


def state_of(part: Any) -> Any:
    return json.loads(part.__getstate__())


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "has no decoder"),
        (decoders.WordPiece(), "decoder 'WordPiece' is not implemented"),
        (decoders.BPEDecoder(), "decoder 'BPEDecoder' is not implemented"),
        (decoders.CTC(), "decoder 'CTC' is not implemented"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "decoder 'ByteLevel' is not implemented"),
        (decoders.Replace("x", " "), "decoder 'Replace' is not implemented"),
        (decoders.Strip(" ", 2, 0), "decoder 'Strip' is not implemented"),
    ],
)
def test_decoders_that_are_not_implemented(decoder: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        tokenizer_of(tmp_path, lambda table: table.update(decoder=decoder and state_of(decoder)))


def test_decoders_in_decoders(tmp_path: Path) -> None:
    nested = decoders.Sequence([decoders.Sequence([decoders.Replace("▁", " ")]), decoders.ByteFallback()])
    assert not tokenizer_of(tmp_path, lambda table: table.update(decoder=state_of(nested))).prefixes_space


def test_a_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    """As Gemma 3's <image_soft_token> is to its text-only models."""
    write_folder(tmp_path)
    engine = byte_level_engine(VOCAB)
    engine.add_special_tokens([AddedToken("<image>", special=True)])
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HfTokenizer.from_files(text_of(tmp_path))
    assert tokenizer.vocab_size == VOCAB + 1 and tokenizer.is_hidden(VOCAB)
    assert tokenizer.encode("abc", add_special=True, parse_special=True)
    with pytest.raises(UsageError, match=f"has token {VOCAB} .'<image>'., the model has {VOCAB}"):
        tokenizer.encode("a <image>", add_special=True, parse_special=True)
    assert tokenizer.encode("a <image>", add_special=True, parse_special=False)


def test_ids_without_a_token_are_hidden(tmp_path: Path) -> None:
    """Rows that fill the table up to a round number."""
    write_folder(tmp_path)
    tokenizer = HfTokenizer.from_files(read_text_side(tmp_path, tmp_path / "config.json", VOCAB + 8))
    assert tokenizer.is_hidden(VOCAB + 3) and tokenizer.decode([VOCAB + 3, 10]) == tokenizer.decode([10])
    for token_id in (VOCAB + 3, VOCAB + 8, -1):
        with pytest.raises(UsageError, match="there is no token"):
            tokenizer.token_bytes(token_id)


def test_a_lone_surrogate(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer_of(tmp_path).encode("a\ud800", add_special=True, parse_special=True)


def test_long_texts_are_told_without_encoding_them_whole(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.is_longer("xyz " * 100_000, 1000, parse_special=True)
    assert not tokenizer.is_longer("xyz " * 100, 1000, parse_special=True)


def test_a_normaliser_runs(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, lambda table: table.update(normalizer=state_of(normalizers.Lowercase())))
    assert tokenizer.decode(tokenizer.encode("ABC", add_special=False, parse_special=True)) == "abc"


# What it takes


def test_a_tokenizer_over_the_budget_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    engine = byte_level_engine(VOCAB)
    table = json.loads(engine.to_str())
    table["model"]["vocab"] |= {f"<t{i}>": VOCAB + i for i in range(150_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    monkeypatch.setattr(HfTokenizer, "from_files", lambda files: pytest.fail("the tokenizer was built"))
    with pytest.raises(OverBudget, match="building a tokenizer of") as refused:
        ModelFile(tmp_path, 64 * MIB)
    assert refused.value.smallest_bytes
    with pytest.raises(pytest.fail.Exception, match="was built"):
        ModelFile(tmp_path, refused.value.smallest_bytes)


_CHILD = """
import sys
from pathlib import Path
from pipo.formats.hf_text import read_text_side
from pipo.hardware.memory import process_memory
from pipo.text.hf_tokenizer import HfTokenizer
folder = Path(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = process_memory().resident_bytes
HfTokenizer.from_files(read_text_side(folder, folder / "config.json", 300_000))
print(process_memory().peak_resident_bytes - before)
"""


def _smollm2(folder: Path, smollm2_path: Path) -> None:
    (folder / "tokenizer.json").write_text(smollm2_json(open_gguf(smollm2_path).metadata))


def _many_tokens(folder: Path, smollm2_path: Path) -> None:
    table = json.loads(byte_level_engine(VOCAB).to_str())
    table["model"]["vocab"] |= {f"Ġtoken{i:06}": VOCAB + i for i in range(250_000)}
    (folder / "tokenizer.json").write_text(json.dumps(table, indent=2))


def _unigram(folder: Path, smollm2_path: Path) -> None:
    vocab = [["<unk>", 0.0], *([f"▁token{i:06}", -1.5] for i in range(150_000))]
    table = json.loads(byte_level_engine(VOCAB).to_str())
    table |= {"model": {**state_of(models.Unigram([("<unk>", 0.0)], 0)), "vocab": vocab}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(table))


@pytest.mark.parametrize("make", [_smollm2, _many_tokens, _unigram])
def test_building_takes_no_more_than_estimated(
    make: Callable[[Path, Path], None], smollm2_path: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    make(tmp_path, smollm2_path)
    taken = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], check=True, capture_output=True, text=True)
    estimate = tokenizer_build_bytes(text_of(tmp_path))
    assert int(taken.stdout) <= estimate + 4 * MIB
    assert estimate < 2 * int(taken.stdout)


def test_other_errors_are_models_errors(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: is JSON, but list in place of an object"):
        open_checkpoint(tmp_path)
