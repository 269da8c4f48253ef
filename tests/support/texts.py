"""Texts that tokenizers disagree on, made from a seed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

_WORD_LIST = """
Hello world The quick brown fox jumps over isn't we've They'LL I'M you'd don't it's 'tis O'Neill rock'n'roll
HTTPServer camelCase snake_case SCREAMING_CASE kebab-case x123 v2.0.1 3.14159 1e-9 0xDEADBEEF 2024-11-24 1,234,567.89
1 12 123 1234 12345 123456 1234567 ½ ⅷ ١٢٣ १२३ １２３ ² ==== ---- .... !!! ??? ... <!-- --> => -> :: && || >>= %s \\n
你好世界 中文字符，没有空格。 こんにちは カタカナ 漢字かな交じり文 안녕하세요 привет мир שלום עולם مرحبا بالعالم हिन्दी
বাংলা தமிழ் ไทย ქართული ελληνικά Ñandú naïve e\u0301te\u0301 Straße ﬁn İstanbul Đặng
👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 🧑🏿‍🚀 ☃ → ∑ ≠ √ € £ © ™ 𝒳 𐍈
def if( ){ }; /* */ // #include <stdio.h> ${x} @property self.x[i] lambda: </div> &amp; "quoted" 'single' `tick`
<|im_start|> <|im_end|> <|endoftext|> <s> </s> <unk> <pad> <0x41> [INST] <|im_start <|im_start|>x|> ▁ Ġ
supercalifragilisticexpialidocious aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
"""
_WORDS = tuple(_WORD_LIST.split())
_SPACES = (" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", "", " \n ", "\u00a0", "\u3000", "\u2028")
_CODE = (
    'def f(x: int = 3) -> str:\n    """Doc."""\n    return f"{x:>10}" if x else None\n',
    "#include <vector>\nint main(int argc, char** argv) {\n\tstd::vector<int> v{1, 2};\n\treturn v[0] != 1;\n}\n",
    'fn main() {\n    let v: Vec<u8> = (0..=255).map(|b| b ^ 0x5a).collect();\n    println!("{:?}", &v[..4]);\n}\n',
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.name LIKE '%x%' GROUP BY 1 HAVING COUNT(*) > 10;\n",
    '{"key": [1, 2.5, null, true], "nested": {"\\u00e9": "\\n"}}\n',
    "const f = async ({a, ...rest}) => (await fetch(`/api/${a}?q=1`)).json();\n",
    "#!/bin/sh\nfor f in *.txt; do grep -E '^[0-9]+' \"$f\" | awk '{print $1}' >> out; done\n",
    "<html>\r\n  <body class='x'>&nbsp;\r\n  </body>\r\n</html>\r\n",
    "main = do\n  xs <- map read . words <$> getLine :: IO [Int]\n  print $ foldr (+) 0 xs\n",
)
_RANGES = (
    (0x00, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0x100), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x590),
    (0x590, 0x700), (0x900, 0xE00), (0xE00, 0x1200), (0x2000, 0x2070), (0x2000, 0x2C00), (0x3000, 0x3100),
    (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xF000, 0xFB00), (0xFF00, 0xFFEF), (0x10300, 0x10400), (0x1D400, 0x1D800),
    (0x20000, 0x2A6D6), (0x0, 0x10FFFF),
)  # fmt: skip
_DENSE = "ab=-.,'0 19\n\t sStTA("


def mixed_texts(seed: int, count: int) -> Iterator[str]:
    """Words of many scripts and languages, runs of few characters, code, and characters of one Unicode range."""
    rng = random.Random(seed)
    makers = (_words, _words, _dense, _code, _characters)
    for idx in range(count):
        yield makers[idx % len(makers)](rng)


def _words(rng: random.Random) -> str:
    return "".join(rng.choice(_WORDS) + rng.choice(_SPACES) for _ in range(rng.randrange(14)))


def _dense(rng: random.Random) -> str:
    letters = rng.sample(_DENSE, rng.randint(1, 6))
    return "".join(rng.choice(letters) for _ in range(rng.randrange(60)))


def _code(rng: random.Random) -> str:
    code = rng.choice(_CODE)
    start = rng.randrange(len(code))
    return code[start : start + rng.randrange(80)] + rng.choice(_SPACES) + rng.choice(_CODE)


def _characters(rng: random.Random) -> str:
    """Only characters that Unicode 3.2 has: newer ones are classified by some tables and not by others."""
    first, last = rng.choice(_RANGES)
    found = (chr(rng.randint(first, last)) for _ in range(rng.randrange(32)))
    return "".join(char for char in found if unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs"))
