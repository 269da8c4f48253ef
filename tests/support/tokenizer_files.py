"""tokenizer.json files of the kinds that models have: trained here on a few lines, or made from a GGUF's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

from pipo.formats.gguf_metadata import GgufMetadata
from tests.support.hf_folders import byte_level_engine, sentence_piece_engine, unigram_engine
from tests.support.texts import mixed_texts

_CORPUS = list(mixed_texts(7, 800))
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIALS = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def smollm2_json(metadata: GgufMetadata) -> str:
    """What a GGUF says, as the model's own tokenizer.json says it."""
    texts, kinds = metadata.strings("tokenizer.ggml.tokens"), metadata.array("tokenizer.ggml.token_type")
    added = [_added(i, text) for i, text in enumerate(texts) if kinds[i] == 3]
    digits, letters = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}
    model = {
        "type": "BPE",
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": metadata.strings("tokenizer.ggml.merges"),
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, {**letters, **_TRIM}]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, **_TRIM},
            "model": model,
        }
    )


_TRIM = {"trim_offsets": True, "use_regex": True}


def _added(token_id: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}


def llama3_like() -> Engine:
    """Byte-level words of a regular expression; a begin token from the post-processor."""
    engine = _byte_level(_LLAMA3, ignore_merges=True)
    bos = engine.token_to_id("<|begin|>")
    template = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", bos)])
    engine.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return engine


def qwen_like() -> Engine:
    """Single digits, in NFC, with tokens that are found in text but shown."""
    engine = _byte_level(_LLAMA3.replace("{1,3}", ""))
    engine.normalizer, engine.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=False)
    engine.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("naïve", single_word=True)])
    return engine


def _byte_level(pattern: str, **settings: Any) -> Engine:
    engine = Engine(models.BPE(**settings))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    _train(engine, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return engine


def gemma_like() -> Engine:
    """Marked spaces without one in front, bytes of what is no token."""
    engine = Engine(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _train(engine, more=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    return _without_special_bytes(engine)


def phi3_like() -> Engine:
    """As Llama 2, with special tokens that take the white space behind them along."""
    engine = sentence_piece_engine(400)
    engine.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True), AddedToken("<|user|>", rstrip=True)])
    return engine


def _without_special_bytes(engine: Engine) -> Engine:
    """What is in the vocabulary stays there."""
    whole = json.loads(engine.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["content"].startswith("<0x")]
    return Engine.from_str(json.dumps(whole))


def _train(engine: Engine, more: list[str] | None = None, **settings: Any) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=_SPECIALS + (more or []), show_progress=False, **settings
    )
    engine.train_from_iterator(_CORPUS, trainer)


ENGINES: Mapping[str, tuple[Callable[[], Engine], dict[str, Any]]] = {
    "gpt2": (lambda: byte_level_engine(400), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "gpt2 with a begin": (
        lambda: byte_level_engine(400),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True},
    ),
    "llama2": (lambda: sentence_piece_engine(400), {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama2 whose tokenizer.json knows better": (
        lambda: sentence_piece_engine(400),
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True},
    ),
    "gpt2 with a token that is special by name": (
        lambda: byte_level_engine(400),
        {"bos_token": "<|im_start|>", "eos_token": "Ġa", "additional_special_tokens": ["ab"]},
    ),
    "llama3": (llama3_like, {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}),
    "qwen": (qwen_like, {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False}),
    "qwen by its own class": (
        qwen_like,
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "gpt2 by its own class": (
        lambda: byte_level_engine(400),
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "gemma": (gemma_like, {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}),
    "phi3": (phi3_like, {"bos_token": "<s>", "eos_token": "<|end|>"}),
    "unigram": (unigram_engine, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def write_engine(folder: Path, name: str) -> Path:
    make, settings = ENGINES[name]
    make().save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    return folder
