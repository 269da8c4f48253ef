"""Prompts of random token ids: what they say does not change what they cost."""

from __future__ import annotations

from random import Random

_FIRST_WORD = 259  # below lie the specials and bytes of the random models


def random_prompt(num_tokens: int, seed: int, vocab_size: int) -> list[int]:
    """The first id is the seed's alone, so that prompts of different seeds share no prefix."""
    rng = Random(seed)
    words = [rng.randrange(_FIRST_WORD, vocab_size) for _ in range(num_tokens - 1)]
    return [_FIRST_WORD + seed % (vocab_size - _FIRST_WORD), *words]
