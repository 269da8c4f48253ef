"""A real model, greedily: the tokens of llama.cpp, or a tie that the rounding of activations decides.

Both engines round activations to 8 bits in front of every product of SmolLM2's Q4_1 weights. Sums in another order
move a few of them to the next integer, and 30 blocks carry that on: logits with a deviation of 8 differ by 0.2 (root
mean square), as far as either is from the exact result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from pipo.engine import Engine
from pipo.generation.request import SamplingParams
from tests.support.engines import start_engine
from tests.support.llama_cpp_engine import LlamaCppEngine
from tests.support.rigs import FloatArray
from tests.support.rounding import logit_tolerance

NUM_TOKENS, CONTEXT_TOKENS = 64, 768
PROMPTS = {
    "chat": "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "code": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "french": "Il était une fois, dans un petit village près de la mer, une jeune fille qui",
    "numbers": "1. one\n2. two\n3. three\n4. four\n5. five\n6. six\n7.",
    "long": "The water cycle describes how water moves above, on and below the ground. Rivers carry it to the sea, "
    "the sun lifts it into the air, and clouds bring it back. " * 8 + "Once upon a time, a drop of water",
}


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with start_engine(smollm2_path, context_tokens=CONTEXT_TOKENS, layout="plain") as engine:
        yield engine


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(smollm2_path, context_tokens=CONTEXT_TOKENS) as oracle:
        yield oracle


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens(engine: Engine, oracle: LlamaCppEngine, name: str) -> None:
    prompt = engine.model.encode(PROMPTS[name])
    ours = greedy(engine, prompt)
    theirs = oracle.greedy(prompt, NUM_TOKENS)
    num_same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    prefix = [*prompt, *ours[:num_same]]
    own, other = logprobs(engine, prefix), oracle.logprobs(prefix, engine.model.manifest.hyper.vocab_size)
    difference = np.abs(own - other)
    assert rms(difference) < math.sqrt(2) * logit_tolerance(30, GgufType.Q4_1, other)
    if ours == theirs:
        sys.stdout.write(f"{name}: identical, {len(ours)} tokens; largest difference {difference.max():.2f}\n")
        return
    rivals = [ours[num_same], theirs[num_same]]
    gaps = [float(row.max() - row[rivals].min()) for row in (own, other)]
    sys.stdout.write(
        f"{name}: {num_same} of {NUM_TOKENS} tokens identical, then a tie: the top two are {gaps[0]:.2f} and "
        f"{gaps[1]:.2f} apart; largest difference {difference.max():.2f}\n"
    )
    assert max(gaps) < 3 * difference.max()


def greedy(engine: Engine, prompt: list[int]) -> list[int]:
    """Up to the first token that ends the answer, which is the last, as it is llama.cpp's."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    ids = [token.token_id for token in engine.complete(prompt, params).tokens]
    end = next((i for i, token_id in enumerate(ids) if token_id in engine.model.tokenizer.end_ids), len(ids))
    return ids[: end + 1]


def logprobs(engine: Engine, prefix: list[int]) -> FloatArray:
    """Of what comes next, over the whole vocabulary: where the request before ended, so from the same cache."""
    vocab_size = engine.model.manifest.hyper.vocab_size
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=vocab_size, ignore_eos=True)
    (token,) = engine.complete(prefix, params).tokens
    row = np.full(vocab_size, np.nan, np.float32)
    for token_id, logprob in token.top:
        row[token_id] = logprob
    return row


def rms(errors: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
