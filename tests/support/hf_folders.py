"""Hugging Face folders of the tiny checkpoints: transformers writes the weights, the tokenizer is `tiny_vocab`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine
from transformers import PreTrainedModel

from tests.support.tiny_vocab import Tokenizer, build_vocab


def save_folder(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: Tokenizer = "gpt2",
    max_shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """`settings` go into tokenizer_config.json."""
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    model.to(torch.float32)
    write_tokenizer(folder, tokenizer, model.config.vocab_size, **settings)
    return folder


def write_tokenizer(folder: Path, tokenizer: Tokenizer, vocab_size: int, **settings: Any) -> None:
    """tokenizer.json and tokenizer_config.json, with the ids that `tiny_vocab` has."""
    engine = byte_level_engine(vocab_size) if tokenizer == "gpt2" else sentence_piece_engine(vocab_size)
    engine.save(str(folder / "tokenizer.json"))
    tokens = build_vocab(tokenizer, vocab_size).tokens
    table = {"bos_token": tokens[1], "eos_token": tokens[2], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def byte_level_engine(vocab_size: int) -> Engine:
    vocab = build_vocab("gpt2", vocab_size)
    merges = [tuple(merge.split(" ")) for merge in vocab.merges]
    engine = Engine(models.BPE({text: i for i, text in enumerate(vocab.tokens)}, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocab.tokens[:3]])
    return engine


def sentence_piece_engine(vocab_size: int) -> Engine:
    """As Llama 2 has it: ▁ before text, bytes of what is no token, <s> in front."""
    vocab = build_vocab("spm", vocab_size)
    ids = {text: i for i, text in enumerate(vocab.tokens)}
    merges = [(t[0], t[1]) for t in vocab.tokens if len(t) == 2]
    engine = Engine(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(parts)
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocab.tokens[:3]])
    engine.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return engine


def unigram_engine() -> Engine:
    """A small Unigram model with Metaspace."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0 - i / 10) for i, letter in enumerate("etaoinshrdlucmfwypvbgkjqxz.,'")]
    pieces += [(word, -5.0 - i / 10) for i, word in enumerate(("▁the", "▁a", "ing", "▁of", "er", "▁to", "th", "on"))]
    engine = Engine(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    engine.decoder = decoders.Metaspace(prepend_scheme="first")
    engine.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return engine


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object; None in `changes` is null."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
