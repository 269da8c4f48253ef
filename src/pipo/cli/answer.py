"""Stream one answer: a sign of life while the prompt is read, then text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from pipo.cli.flags import OutputFlags
from pipo.cli.progress import progress_display
from pipo.engine import Engine
from pipo.generation.request import ConstraintSpec, FinishReason, Sampled, SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    tokens: tuple[Sampled, ...]
    finish: FinishReason


def stream_answer(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    output: OutputFlags,
    on_text: Callable[[str], None],
    constraint: ConstraintSpec | None = None,
) -> Answer:
    """`on_text` gets the pieces as they come. Whatever is raised meanwhile stops the computation first."""
    texts: list[str] = []
    tokens: list[Sampled] = []
    finish = FinishReason.CANCELLED
    prefill = progress_display("prefill", len(prompt), output)
    try:
        prefill.start()
        with closing(engine.stream(prompt, params, prefill.advance, constraint=constraint)) as pieces:
            for piece in pieces:
                prefill.stop()
                if piece.text:
                    texts.append(piece.text)
                    on_text(piece.text)
                if piece.token is not None:
                    tokens.append(piece.token)
                finish = piece.finish or finish
    finally:
        prefill.stop()
    return Answer("".join(texts), tuple(tokens), finish)
