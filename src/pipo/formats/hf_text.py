"""What a Hugging Face folder says of text: where its tokenizer lies, special tokens, chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.units import MIB
from pipo.formats.hf_folder import find_file
from pipo.formats.json_object import JsonSize, read_object, read_text

TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_ADDED_KEY = "added_tokens_decoder"
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_TOKENIZER_BYTES = 64 * MIB  # Gemma 3's, the largest so far, takes 33 MB
MAX_SETTINGS_BYTES = 4 * MIB  # of tokenizer_config.json; Gemma 3's takes 1.2 MB
MAX_TEMPLATE_BYTES = MIB
_TEMPLATE_KEY = "tokenizer.chat_template"  # as the text side asks any format
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True)
class AddedText:
    """A token that is found in text before any other, and how."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True, slots=True)
class HfText:
    """`vocab_size` rows has the embedding table: tokens beyond cannot be passed. Of `ends` each ends a generation.

    `specials` are the texts that tokenizer_config.json names, which makes special tokens of those that are tokens;
    `added` its tokens in the order of ids, whose form goes before that of tokenizer.json.
    """

    tokenizer_path: Path
    tokenizer_size: JsonSize
    vocab_size: int
    bos: str | int | None
    eos: str | int | None
    ends: frozenset[int]
    specials: tuple[str, ...]
    chat_template: str | None
    added: tuple[AddedText, ...] = ()

    def get(self, key: str) -> object | None:
        """The one key that the text side asks of every format."""
        return self.chat_template if key == _TEMPLATE_KEY else None


def read_text_side(folder: Path, config: Path, vocab_size: int) -> HfText:
    """Raises ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed."""
    path = find_file(folder, TOKENIZER)
    if path is None:
        raise _no_tokenizer(folder)
    size = JsonSize.of(path, MAX_TOKENIZER_BYTES)
    model, generation = read_object(config, MAX_SETTINGS_BYTES), _object(folder, GENERATION)
    settings = _object(folder, SETTINGS)
    return HfText(
        path,
        size,
        vocab_size,
        bos=_token(folder, settings, model, "bos"),
        eos=_token(folder, settings, model, "eos"),
        ends=_end_ids(folder, GENERATION, generation) | _end_ids(folder, config.name, model),
        specials=tuple(_specials(settings)),
        added=_added(folder, settings),
        chat_template=_chat_template(folder, settings),
    )


def _no_tokenizer(folder: Path) -> UnsupportedModel:
    others = [name for name in _OTHER_TOKENIZERS if (folder / name).exists()]
    found = f"; {others[0]} alone is not read" if others else ""
    return UnsupportedModel(
        f"{folder}: has no {TOKENIZER}{found}",
        hint="transformers writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def _object(folder: Path, name: str) -> Mapping[str, object]:
    path = find_file(folder, name)
    return {} if path is None else read_object(path, MAX_SETTINGS_BYTES)


def _specials(settings: Mapping[str, object]) -> Iterator[str]:
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        text = _text_of(settings.get(name))
        if text:
            yield text
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(name)
        yield from (text for each in listed if (text := _text_of(each))) if isinstance(listed, list) else ()


def _added(folder: Path, settings: Mapping[str, object]) -> tuple[AddedText, ...]:
    """Source: transformers, which adds all of them to a tokenizer that it has opened."""
    table = settings.get(_ADDED_KEY)
    if table is None:
        return ()
    if not isinstance(table, dict) or not all(key.isdecimal() and len(key) < 10 for key in table):
        raise _wrong(folder, SETTINGS, _ADDED_KEY, table, "a table of tokens by id")
    return tuple(_added_text(folder, table[key]) for key in sorted(table, key=int))


def _added_text(folder: Path, token: object) -> AddedText:
    text, flags = _text_of(token), token if isinstance(token, dict) else {}
    given = {name: flags[name] for name in _FLAGS if name in flags}
    if not text or not all(isinstance(value, bool) for value in given.values()):
        raise _wrong(folder, SETTINGS, _ADDED_KEY, token, "a text and flags")
    return AddedText(text, **given)


def _text_of(token: object) -> str | None:
    """A token stands as a text, or as a table with one. A lone surrogate is no text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and not _SURROGATE.search(text) else None


def _token(folder: Path, settings: Mapping[str, object], model: Mapping[str, object], role: str) -> str | int | None:
    """A text from tokenizer_config.json, where there is that file; else an id from config.json."""
    if not settings:
        value = model.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int else None
    name = f"{role}_token"
    value = settings.get(name)
    if value is not None and _text_of(value) is None:
        raise _wrong(folder, SETTINGS, name, value, "a token")
    return _text_of(value)


def _end_ids(folder: Path, file: str, table: Mapping[str, object]) -> frozenset[int]:
    value = table.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(each) is int and each >= 0 for each in ids):
        return frozenset(ids)
    raise _wrong(folder, file, "eos_token_id", value, "a token id or a list of them")


def _chat_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """A file of its own goes first. Of several templates the one named "default"."""
    path = find_file(folder, "chat_template.jinja")
    if path is not None:
        return read_text(path, MAX_TEMPLATE_BYTES)
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = (each.get("template") for each in value if isinstance(each, dict) and each.get("name") == "default")
        value = next(named, None)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(folder, SETTINGS, "chat_template", value, "a text")


def _wrong(folder: Path, file: str, name: str, found: object, wanted: str) -> MalformedFile:
    return MalformedFile(f"{folder}: field {name!r} of {file} is {found!r:.80}, wanted {wanted}")
