"""Texts on which two tokenizers that are not the same part: scripts, digits, spaces, lines, signs, special tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import product

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.", "It isn't what we've seen; they'll say I'M wrong, you'd DON'T.",
    "'tis rock'n'roll, O'Neill's", "HTTPServer camelCase snake_case SCREAMING_CASE kebab-case x2y3z v2.0.1",
    "Straße, naïve café, Ñandú, İstanbul, Đặng, ﬁn, Œuvre, þorn, Łódź", "e\u0301te\u0301 n\u0303 A\u030a q\u0307\u0323",
    "Привет, мир! Ёлка 2024 года.", "Γειά σου Κόσμε, ελληνικά", "שלום עולם", "مرحبا بالعالم، ١٢٣٤٥", "हिन्दी में १२३४ पाठ",
    "বাংলা লেখা", "தமிழ் எழுத்து", "ภาษาไทย ๑๒๓", "ქართული ენა", "Հայերեն", "አማርኛ", "ខ្មែរ", "မြန်မာ", "ລາວ", "සිංහල",
    "你好世界，中文字符。没有空格", "漢字かな交じり文、カタカナ。", "こんにちは 世界", "안녕하세요 세계",
    "ㄅㄆㄇ １２３ ＡＢＣ",     "👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☃ → ∑ ≠ √ 𝒳 𐍈 𠮷", "€ £ ¥ © ® ™ ° ² ½ ⅷ №",
    "3.14159 1e-9 0xDEADBEEF 1,234,567.89 24/11/2024",
    "def f(x: int = 3) -> str:\n    \"\"\"Doc.\"\"\"\n\treturn f\"{x:>10}\" if x else None\n",
    "#include <vector>\nint main(int argc, char** argv) {\n\treturn v[0] != 1 && a->b == c::d;\n}\n",
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.name LIKE '%x%' GROUP BY 1;\r\n", "<div class='x'>&nbsp;</div>\r\n\r\n",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"\\u00e9\": \"\\n\"}}", "https://example.org/a?c=d&e=%20f#g",
    "a@b.c", "supercalifragilisticexpialidocious", "aAaAbBbB", "ABCdef GHIjkl",
    "x\u200by \ufeffz \u00ad \u2028 \u2029 \u3000 \u00a0 .",
    "<0x0A> <0x41> ▁ ▁▁ a▁b Ġ Ċ <s> </s> <unk> [PAD1] <|im_start|> <|endoftext|> [INST]",
)  # fmt: skip
_RUNS = (
    " ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "-", "=", ".", "!", "'", "a", "1", "é", "猫", "_", "0 ", " \n", "\n ",
)  # fmt: skip
_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64)
_AROUND = (("", ""), ("a", "b"), (" ", " "), ("", "x"), ("x", ""), ("\n", "\n"), ("1", "2"), ("é", "猫"))
_SPECIAL_AROUND = (("a", "b"), ("a ", " b"), ("\n", "\n"), ("", "  b"), ("a  ", ""), (".", ","))
_MAX_SPECIAL, _MAX_TOKENS, _CHUNK = 64, 600, 6
_CHARACTERS_OF_A_CATEGORY = 24


def probe_texts(special: Sequence[str], tokens: Sequence[str]) -> Iterator[str]:
    """`special` are the texts of added tokens, `tokens` of a vocabulary, of which some are taken."""
    yield ""
    yield from _SENTENCES
    yield from (f" {text} " for text in _SENTENCES)
    for run, length in product(_RUNS, _LENGTHS):
        yield from (f"{run * length}", f"a{run * length}b")
    for number, (before, after) in product(("1", "12", "123", "1234", "12345", "1234567", "1234567890"), _AROUND):
        yield f"{before}{number}{after}"
    yield from _characters()
    for token in _spread(special, _MAX_SPECIAL):
        yield from (f"{before}{token}{after}" for before, after in _SPECIAL_AROUND)
    yield "".join(_spread(special, _MAX_SPECIAL))
    some = _spread(tokens, _MAX_TOKENS)
    for start in range(0, len(some), _CHUNK):
        yield from ("".join(some[start : start + _CHUNK]), " ".join(some[start : start + _CHUNK]))


def _characters() -> Iterator[str]:
    """Each of the first 384, and some of every category of Unicode."""
    for code in range(0x180):
        yield from (chr(code), f"a{chr(code)}b {chr(code)}{chr(code)}1")
    found: dict[str, list[str]] = {}
    for code in (*range(0x180, 0x3400), *range(0xA000, 0xAC00, 3), *range(0xF900, 0x1F800, 7)):
        category = unicodedata.category(chr(code))
        if category not in ("Cs", "Cn"):
            found.setdefault(category, []).append(chr(code))
    for characters in found.values():
        some = _spread(characters, _CHARACTERS_OF_A_CATEGORY)
        yield from ("".join(some), " ".join(some), "a".join(some), f"x {some[0]}1{some[-1]}")


def _spread(texts: Sequence[str], most: int) -> list[str]:
    """At most so many, from the first to the last."""
    step = max(-(-len(texts) // most), 1)
    return list(texts[::step])
