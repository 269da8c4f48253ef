from __future__ import annotations

import time

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split

from pipo.base.errors import UnsupportedModel
from pipo.text.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizer

HOSTILE = {
    "spaces": " " * 20_000 + "x",
    "tabs": "\t " * 10_000 + "x",
    "lines": "\n" * 20_000 + "x",
    "letters": "a" * 20_000 + "!",
    "capitals": "A" * 20_000 + "!",
    "digits before a letter": "1" * 20_000 + "a",
    "digits": "1" * 20_000 + " ",
    "signs": "!" * 20_000,
    "accents": "e\u0301" * 10_000,
    "ideographs": "中" * 20_000,
    "words": "a b " * 5_000,
}


def words(name: str, text: str) -> list[str]:
    steps = Sequence([Split(Regex(pattern), "isolated") for pattern in find_pre_tokenizer(name).patterns])
    return [word for word, _ in steps.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_words_join_to_the_text(name: str) -> None:
    text = "Ab ça  12345\n\t x's ½ 漢字かな\r\n -- É\u0301 \u3000IMGIMGABZ<sentinel:7>"
    assert "".join(words(name, text)) == text


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_no_text_takes_quadratic_time(name: str) -> None:
    """Each takes 5 to 30 ms; quadratic ones took seconds before they were written otherwise."""
    for what, text in HOSTILE.items():
        start = time.perf_counter()
        words(name, text)
        assert time.perf_counter() - start < 2, what


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'm  12 (x)", ["I", "'m", " ", " 12", " (", "x", ")"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "1234 WE'LL\n\n x", ["123", "4", " WE", "'LL", "\n\n", " x"]),
        ("qwen2", "12 a", ["1", "2", " a"]),
        ("superbpe", "a 1234567b", ["a ", "1", "234", "567", "b"]),
        ("afmoe", "1234567", ["1", "234", "567"]),
        ("afmoe", "123", ["123"]),
        ("tiny_aya", "12345 12345x", ["12", "345", " ", "123", "45", "x"]),
        ("deepseek-v3", "漢字abc1234", ["漢字", "abc", "123", "4"]),
        ("falcon", "a!=1234", ["a", "!=", "123", "4"]),
        ("bloom", "a b.c", ["a", " b", ".", "c"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
    ],
)
def test_words(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tekken", "ПриветМир", ["Привет", "Мир"]),
        ("tekken", "हिन्दी", ["हिन्दी"]),
        ("gpt-4o", "Ünder'S", ["Ünder'S"]),
        ("kimi-k2", "camelCase漢字", ["camel", "Case", "漢字"]),
        ("youtu", "camelCase", ["camel", "Case"]),
        ("afmoe", "\t\t0", ["\t\t", "0"]),
        ("deepseek-coder", "a\u3000b", ["a", "\u3000", "b"]),
    ],
)
def test_words_where_llama_cpp_only_approximates_the_model(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


def test_unknown_names() -> None:
    with pytest.raises(UnsupportedModel, match="'x'"):
        find_pre_tokenizer("x")
