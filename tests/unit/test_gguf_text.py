"""A tokenizer.json as the keys of a GGUF: the same ids, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine
from tokenizers.trainers import BpeTrainer

from pipo.base.errors import UnsupportedModel
from pipo.formats.gguf import open_gguf
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.gguf_writer import header_bytes
from pipo.formats.hf_text import MAX_TOKENIZER_BYTES, HfText
from pipo.formats.json_object import JsonSize
from pipo.text.gguf_text import GgufText, gguf_text_of
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.hf_folders import byte_level_engine, sentence_piece_engine, unigram_engine
from tests.support.texts import mixed_texts
from tests.support.tokenizer_files import llama3_like, phi3_like, qwen_like

NAME = "tiny"


def files_of(engine: Engine, folder: Path, rows: int | None = None, **settings: Any) -> HfText:
    path = folder / "tokenizer.json"
    engine.save(str(path))
    size = JsonSize.of(path, MAX_TOKENIZER_BYTES)
    wanted = {"bos": None, "eos": None, "ends": frozenset(), "specials": (), "chat_template": None, **settings}
    return HfText(path, size, rows or engine.get_vocab_size(), **wanted)


def written(text: GgufText, folder: Path) -> GgufMetadata:
    """As a reader finds it."""
    path = folder / "text.gguf"
    path.write_bytes(header_bytes(text.entries, [], 32))
    return open_gguf(path).metadata


def convert(engine: Engine, folder: Path, rows: int | None = None, **settings: Any) -> tuple[GgufMetadata, GgufText]:
    """After looking at texts that are not among the built-in ones."""
    files = files_of(engine, folder, rows, **settings)
    text = gguf_text_of(files, NAME)
    metadata = written(text, folder)
    ours, theirs = Tokenizer.from_metadata(metadata), HfTokenizer.from_files(files)
    for probe in mixed_texts(3, 300):
        if not text.losses:
            wanted = theirs.encode(probe, add_special=True, parse_special=True)
            assert ours.encode(probe, add_special=True, parse_special=True) == wanted, probe
    return metadata, text


def refusal(engine: Engine, folder: Path, name: str = NAME, **settings: Any) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        gguf_text_of(files_of(engine, folder, **settings), name)
    return str(refused.value)


def split_by(*cuts: object) -> Engine:
    """Byte-level words, cut so before they are spelled in letters."""
    engine = byte_level_engine(400)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    return engine


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("engine", "pre"),
    [
        (byte_level_engine(400), "gpt-2"),
        (llama3_like(), "llama-bpe"),
        (split_by(pre_tokenizers.Split(Regex(LLAMA3), "isolated")), "dbrx"),
        (split_by(pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True)), "dbrx"),
        (split_by(pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")), "qwen2"),
        (split_by(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)), None),
    ],
)
def test_the_name_of_the_pre_tokenizer(engine: Engine, pre: str | None, tmp_path: Path) -> None:
    if pre is None:
        assert "the pre-tokenizer" in refusal(engine, tmp_path)  # letters are spelled twice
    else:
        assert convert(engine, tmp_path)[0].text("tokenizer.ggml.pre") == pre


def test_single_digits_before_words_of_gpt2(tmp_path: Path) -> None:
    engine = byte_level_engine(400)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert convert(engine, tmp_path)[0].text("tokenizer.ggml.pre") == "smollm"


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,5}|\s+"), "isolated"),
        pre_tokenizers.Split(Regex(LLAMA3), "merged_with_next"),
        pre_tokenizers.Split(Regex(LLAMA3), "isolated", invert=True),
        pre_tokenizers.Split("a", "isolated"),
        pre_tokenizers.Punctuation(),
    ],
)
def test_a_pre_tokenizer_without_a_name_is_refused(cut: object, tmp_path: Path) -> None:
    message = refusal(split_by(cut), tmp_path)
    assert message.startswith("tiny: the pre-tokenizer [{") and "is none that a GGUF can name" in message


def test_a_space_before_byte_level_words_is_refused(tmp_path: Path) -> None:
    engine = byte_level_engine(400)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert '"add_prefix_space": true' in refusal(engine, tmp_path)


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("a", "b")])
def test_a_normalizer_is_refused(normalizer: Any, tmp_path: Path) -> None:
    engine = byte_level_engine(400)
    engine.normalizer = normalizer
    assert "tiny: the normalizer [{" in refusal(engine, tmp_path)


def test_nfc_is_told(tmp_path: Path) -> None:
    """As every GGUF of a Qwen has it."""
    engine = byte_level_engine(400)
    engine.normalizer = normalizers.NFC()
    _, text = convert(engine, tmp_path)
    assert len(text.losses) == 1 and "normalises text (NFC), which no GGUF can say" in text.losses[0]


def test_a_token_only_as_a_whole_word_is_refused_with_the_text(tmp_path: Path) -> None:
    message = refusal(qwen_like(), tmp_path)
    assert "the text 'anaïveb' has tokens … " in message and "with the tokenizer that a GGUF would get" in message


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_token_that_takes_spaces_along_is_refused(side: Any, tmp_path: Path) -> None:
    engine = byte_level_engine(400)
    engine.add_special_tokens([AddedToken("<mask>", special=True, **{side: True})])
    assert "<mask>" in refusal(engine, tmp_path)


def test_those_of_phi3_do_so_by_its_name(tmp_path: Path) -> None:
    engine = phi3_like()
    state = json.loads(engine.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>")
    engine = Engine.from_str(json.dumps(state))
    assert "with the tokenizer that a GGUF would get" in refusal(engine, tmp_path)
    assert gguf_text_of(files_of(engine, tmp_path), "Phi-3-mini").entries


def test_unigram_is_refused(tmp_path: Path) -> None:
    assert "its tokenizer is Unigram, a GGUF gets byte pairs (BPE) only" in refusal(unigram_engine(), tmp_path)


def test_rows_without_a_token(tmp_path: Path) -> None:
    metadata, _ = convert(byte_level_engine(400), tmp_path, rows=403)
    assert metadata.strings("tokenizer.ggml.tokens")[400:] == ["[PAD400]", "[PAD401]", "[PAD402]"]
    assert metadata.array("tokenizer.ggml.token_type")[398:].tolist() == [1, 1, 5, 5, 5]


def test_tokens_without_a_row(tmp_path: Path) -> None:
    """Added ones are left out; a merge to one is refused."""
    engine = byte_level_engine(400)
    engine.add_tokens(["<more>"])
    assert len(convert(engine, tmp_path, rows=400)[0].strings("tokenizer.ggml.tokens")) == 400
    assert "its tokenizer cannot be written" in refusal(engine, tmp_path, rows=390)


def test_special_tokens_and_template(tmp_path: Path) -> None:
    engine = llama3_like()
    engine.add_tokens([AddedToken("<tool>", normalized=False)])
    metadata, text = convert(
        engine, tmp_path, bos="<|begin|>", eos="<|im_end|>", ends=frozenset({7}), chat_template="{{ messages }}"
    )
    ids = {name: engine.token_to_id(name) for name in ("<|begin|>", "<|im_end|>", "<tool>")}
    assert metadata.get("tokenizer.ggml.bos_token_id") == ids["<|begin|>"]
    assert metadata.get("tokenizer.ggml.eos_token_id") == ids["<|im_end|>"]
    assert metadata.flag("tokenizer.ggml.add_bos_token") is True
    assert metadata.flag("tokenizer.ggml.add_eos_token") is False
    kinds = metadata.array("tokenizer.ggml.token_type")
    assert [kinds[i] for i in ids.values()] == [3, 3, 4]
    assert metadata.text("tokenizer.chat_template") == "{{ messages }}"
    assert len(text.losses) == 1 and "end answers of the folder, but not of the file" in text.losses[0]


def test_two_tokens_before_text_are_refused(tmp_path: Path) -> None:
    engine = llama3_like()
    ids = [(text, engine.token_to_id(text)) for text in ("<|begin|>", "<|im_start|>")]
    engine.post_processor = processors.TemplateProcessing("<|begin|> <|im_start|> $A", None, ids)
    assert f"puts [{ids[0][1]}, {ids[1][1]}] before text" in refusal(engine, tmp_path)


def test_sentence_pieces(tmp_path: Path) -> None:
    metadata, _ = convert(sentence_piece_engine(400), tmp_path)
    assert metadata.text("tokenizer.ggml.model") == "llama"
    assert metadata.flag("tokenizer.ggml.add_space_prefix") is True
    scores, kinds = (metadata.array(f"tokenizer.ggml.{key}") for key in ("scores", "token_type"))
    assert kinds[:5].tolist() == [2, 3, 3, 6, 6]
    assert scores.dtype == np.float32 and scores[259:262].tolist() == [0, -1, -2]


def marked_engine(*, spans_lines: bool = False) -> Engine:
    """Learned merges over marked spaces, as Gemma's are spelled: scores cannot say their order."""
    engine = Engine(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]+|\n+") if not spans_lines else "#", "isolated")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = ["the▁cat\nthe▁dog\nthat▁hat\nthere\n\n▁▁▁▁the\nthen▁thin\ncat\nthe"] * 20
    specials = ["<unk>", "<s>", "</s>", *byte_tokens]
    engine.train_from_iterator(texts, BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False))
    state = json.loads(engine.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    engine = Engine.from_str(json.dumps(state))
    engine.normalizer, engine.pre_tokenizer = normalizers.Replace(" ", "▁"), None
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return engine


def test_merges_that_scores_cannot_say(tmp_path: Path) -> None:
    metadata, _ = convert(marked_engine(), tmp_path)
    assert metadata.text("tokenizer.ggml.model") == "gemma4"
    assert len(metadata.strings("tokenizer.ggml.merges")) > 20


def test_such_merges_without_a_begin_token(tmp_path: Path) -> None:
    """llama.cpp would put one before text."""
    state = json.loads(marked_engine().to_str()) | {"post_processor": None}
    assert "cannot be said by scores" in refusal(Engine.from_str(json.dumps(state)), tmp_path)


def test_tokens_of_fill_in_the_middle_stay_text(tmp_path: Path) -> None:
    """A reader makes special tokens of those that no key names."""
    engine = byte_level_engine(400)
    engine.add_tokens([AddedToken("<|fim_prefix|>", normalized=False), AddedToken("<|repo_name|>", normalized=False)])
    metadata, text = convert(engine, tmp_path)
    assert text.losses == () and metadata.get("tokenizer.ggml.fim_pre_token_id") == 400
    assert metadata.get("tokenizer.ggml.fim_rep_token_id") == 401


def test_text_that_readers_take_for_a_special_token_is_told(tmp_path: Path) -> None:
    """As `</s>` in Qwen's vocabulary."""
    engine = byte_level_engine(400)
    engine.add_tokens([AddedToken("</s>", normalized=False)])
    metadata, text = convert(engine, tmp_path)
    assert text.losses == ("readers of a GGUF take '</s>' for special tokens, which are text in the folder",)
    assert metadata.array("tokenizer.ggml.token_type")[400] == 4


def test_merges_that_nothing_can_say(tmp_path: Path) -> None:
    assert "cannot be said by scores of sentence pieces" in refusal(marked_engine(spans_lines=True), tmp_path)
    prefixed = marked_engine()
    prefixed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert "cannot be said by scores of sentence pieces" in refusal(prefixed, tmp_path)


def test_marks_without_a_token_for_every_byte(tmp_path: Path) -> None:
    state = json.loads(sentence_piece_engine(400).to_str())
    state["model"]["vocab"]["?"] = state["model"]["vocab"].pop("<0x41>")
    assert "no token for every byte" in refusal(Engine.from_str(json.dumps(state)), tmp_path)
