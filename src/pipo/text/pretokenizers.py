r"""How text is cut into words before BPE merges letters: one entry for each name GGUF files carry.

GGUF names a model's pre-tokenizer (`tokenizer.ggml.pre`) instead of spelling its regular expressions out. The
expressions here are those of the models' own `tokenizer.json`, as far as they are known. llama.cpp approximates some,
and there our ids are the model's, not llama.cpp's: letter case and combining marks outside ASCII (gpt-4o, tekken, …;
in ASCII too for kimi-k2, youtu, tiny_aya), white space outside ASCII (deepseek-llm, deepseek-coder), what stands
before numbers (afmoe, tiny_aya). `tests/parity` shows that all else is equal. Unicode normalisation (Qwen: NFC) is not
in GGUF; like llama.cpp, we do none.

Source: llama.cpp `src/llama-vocab.cpp`. Syntax: Oniguruma. Cost: every expression is linear in the text; those for
digits are not written as published, with a look-ahead to the end of the number, which is quadratic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipo.base.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The first pattern cuts the text at its matches, the next one cuts the pieces, and so on; gaps are words too.

    `is_byte_level` words are spelled in GPT-2's letters for bytes; others keep their characters, with ▁ for a space.
    `ignores_merges`: a word that is a token is that token, whatever its merges say. `adds_bos` holds where the file
    does not say.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    is_byte_level: bool = True


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """Raises UnsupportedModel, with the names there are."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(
            f"the pre-tokenizer {name!r:.80} (key 'tokenizer.ggml.pre') is not implemented", hint=f"known are {known}"
        ) from None


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_LINES_AND_SPACES = rf"\s*[\r\n]+|{_SPACES}"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

GPT2_PATTERN = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_LINES_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_LINES_AND_SPACES}"

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased_words(ending: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """Words that end where the case goes from lower to upper: "camel", "Case"."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return rf"{start}[{upper}]*[{lower}]+{ending}|{start}[{upper}]+[{lower}]*{ending}"


_CASED_WORDS = _cased_words(rf"{_CONTRACTIONS}?")
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = rf"{_CASED_WORDS}|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASHES}|{_LINES_AND_SPACES}"
_TEKKEN = rf"{_cased_words('')}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_LINES_AND_SPACES}"

_NOT_HAN = r"&&[^\p{Han}]"
_KIMI_WORDS = _cased_words(rf"{_CONTRACTIONS}?", _UPPER + _NOT_HAN, _LOWER + _NOT_HAN)
_KIMI = rf"\p{{Han}}+|{_KIMI_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_LINES_AND_SPACES}"

_DEEPSEEK3_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_DEEPSEEK3 = PreTokenizer(
    (r"\p{N}{1,3}", _DEEPSEEK3_KANA, rf"{_DEEPSEEK3_WORDS}[\r\n]*|{_LINES_AND_SPACES}")
)  # fmt: skip
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with case, of the Unicode version DeepSeek listed them from
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"

# CJK, kana, Thai, Lao, Khmer, Burmese, Hangul. llama.cpp's second range of ideographs starts at U+8C48, to which
# Unicode normalisation took the U+F900 of the original.
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _threes_from_end(number: str, digit: str) -> tuple[str, ...]:
    """1|234|567: cut whole numbers, then their first one or two digits, then threes."""
    return (number, rf"\A{digit}{{1,2}}(?=(?:{digit}{{3}})+\z)", rf"{digit}{{3}}")


_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_JAIS2_SPACES = "|".join(rf"\s{{{run}}}(?!\S)" for run in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))

_LLAMA3_WORDS = PreTokenizer((_LLAMA3,))
_LLAMA3_MODELS = replace(_LLAMA3_WORDS, ignores_merges=True, adds_bos=True)
_GPT2_WORDS = PreTokenizer((GPT2_PATTERN,))
_GPT2_DIGITS = PreTokenizer((r"\p{N}", GPT2_PATTERN))
_QWEN2_WORDS = PreTokenizer((_QWEN2,))
_GPT4O_WORDS = PreTokenizer((_GPT4O,))
_BLOOM_WORDS = PreTokenizer((_BLOOM,))
_MARKED_SPACES = PreTokenizer((r"[^\n]+|\n+",), is_byte_level=False)
_GEMMA4 = replace(_MARKED_SPACES, adds_bos=True)
_TINY_AYA = PreTokenizer((*_threes_from_end(r"(?<!\d)\d++\b", r"\d"), _GPT4O))
_BAILING = PreTokenizer(
    (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|{_SPACES}",)
)  # fmt: skip
_EXAONE_MOE_WORD = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"


def _by_name(*rows: tuple[Iterable[str], PreTokenizer]) -> dict[str, PreTokenizer]:
    return {name: pre_tokenizer for names, pre_tokenizer in rows for name in names}


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = _by_name(
    (
        ["default"],
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    (
        ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        _LLAMA3_MODELS,
    ),
    (["dbrx", "smaug-bpe", "chatglm-bpe"], _LLAMA3_WORDS),
    (["glm4", "glm5"], replace(_LLAMA3_WORDS, ignores_merges=True)),
    (
        ["jais-2"],
        PreTokenizer(
            (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_JAIS2_SPACES}|\s",),
        ),
    ),
    (
        ["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0"],
        _GPT2_WORDS,
    ),
    (["mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en"], _GPT2_WORDS),
    (["jina-v2-es", "jina-v2-de", "jina-v2-code"], _GPT2_WORDS),
    (["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"], _GPT2_DIGITS),
    (["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"], _QWEN2_WORDS),
    (["solar-open", "grok-2"], _QWEN2_WORDS),
    (
        ["qwen35"],
        PreTokenizer(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}",
            )
        ),
    ),
    (["ufakzeka"], PreTokenizer((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_LINES_AND_SPACES}",))),
    (["laguna"], PreTokenizer((r"[^\n]+|\n+", _QWEN2))),
    (
        ["seed-coder"],
        PreTokenizer((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES_AND_SPACES}",)),
    ),
    (
        ["minicpm5"],
        PreTokenizer(
            (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SIGNS}|{_LINES_AND_SPACES}"), ignores_merges=True
        ),
    ),
    (
        ["exaone-moe"],
        PreTokenizer(
            (rf"{_CONTRACTIONS}|{_EXAONE_MOE_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",)
        ),
    ),
    (["bailingmoe", "bailingmoe2", "llada-moe"], _BAILING),
    (
        ["deepseek-llm"],
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
                r"(?<!\s)\s+$",
                _DEEPSEEK_HAN,
                r"\p{N}+",
            )
        ),
    ),
    (["deepseek-coder"], PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"))),
    (["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], _DEEPSEEK3),
    (
        ["spark2_5"],
        PreTokenizer((r"\p{N}{1,3}", _DEEPSEEK3_KANA, rf"{_DEEPSEEK3_WORDS}|[\r\n]|{_SPACES}", r"\p{N}")),
    ),
    (
        ["afmoe"],
        PreTokenizer(
            (
                *_threes_from_end(r"\p{N}+", r"\p{N}"),
                _AFMOE_SCRIPTS,
                rf"{_DEEPSEEK3_WORDS}[\r\n]*|{_LINES_AND_SPACES}",
            )
        ),
    ),
    (
        ["youtu"],
        PreTokenizer(
            (_YOUTU_SCRIPTS, rf"{_CASED_WORDS}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_LINES_AND_SPACES}"), ignores_merges=True
        ),
    ),
    (["falcon"], PreTokenizer((_FALCON_PUNCTUATION, GPT2_PATTERN, r"[0-9][0-9][0-9]"))),
    (["poro-chat", "bloom", "gpt3-finnish"], _BLOOM_WORDS),
    (["viking"], PreTokenizer((_BLOOM, r"\p{N}"))),
    (["tekken"], PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True)),
    (
        ["chameleon"],
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(?:IMGIMG)(?:[A-I]{1,4})Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2_PATTERN,
            ),
            adds_bos=True,
        ),
    ),
    (["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], _GPT4O_WORDS),
    (["granite-embed-multi-97m"], replace(_GPT4O_WORDS, ignores_merges=True)),
    (["tiny_aya", "cohere2moe"], _TINY_AYA),
    (["superbpe"], PreTokenizer((r"\p{N}+", *_threes_from_end(r"\d+", r"\d")))),
    (["kimi-k2"], PreTokenizer((_KIMI,))),
    (["gemma4", "granite-embed-multi-311m"], _GEMMA4),
    (["sarvam-moe"], _MARKED_SPACES),
)
