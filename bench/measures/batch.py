"""Tokens per second of several sequences that share every sweep, beside what the planner says of them.

Each budget and batch size is planned, predicted from what this machine was measured to do in the same run, and run.
Answers are held against those of sequences that have every pass to themselves: products of other shapes round in other
ways, so that an answer may part from the lone one where two tokens are nearly as likely. Those are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from bench.child import Child, ChildFailed
from bench.lab import Lab
from bench.messages import AnswerAlone, Batch, LoneAnswer
from bench.rows import Row, at_least, at_most, row, skipped
from pipo.hardware.cache import tells_of_a_drive

SIZES = {0.75: (1, 8), 0.5: (1, 2, 4, 8, 16, 32, 64), 0.25: (1, 8)}  # of batches, by the share of the file
PROMPT_TOKENS, NUM_PASSES = 8, 8
MOST_OFF = 15.0  # %
LEAST_GAIN = {8: 4.0}  # × one sequence
TIE = 0.05  # between the logits of two tokens that rounding may order either way


def measure(lab: Lab) -> Iterator[Row]:
    if not tells_of_a_drive([lab.path]):
        yield skipped("batch", "all", "the file is too small to measure a drive with")
        return
    lab.plan(lab.setup(lab.roomy_bytes))  # measures the drive with every way to read that a budget might allow
    alone = _answers_alone(lab, max(max(sizes) for sizes in SIZES.values()))
    for share, sizes in SIZES.items():
        yield from _budget(lab, int(lab.file_bytes * share), f"{share:.0%} of the file", sizes, alone)


def _answers_alone(lab: Lab, num_prompts: int) -> tuple[LoneAnswer, ...]:
    """All resident, which gives the same bits as any budget."""
    with lab.start_pipo(lab.setup(lab.roomy_bytes)).child as child:
        return child.ask(AnswerAlone(num_prompts, PROMPT_TOKENS, NUM_PASSES))


def _budget(lab: Lab, ram_bytes: int, budget: str, sizes: Sequence[int], alone: Sequence[LoneAnswer]) -> Iterator[Row]:
    one: float | None = None
    for size in sizes:
        what = f"{size} at a time, {budget}"
        setup = replace(lab.setup(ram_bytes), context_tokens=PROMPT_TOKENS + 2 * NUM_PASSES)
        with Child("pipo", environment={"XDG_CACHE_HOME": str(lab.settings.cache_folder)}) as child:
            try:
                found = child.ask(Batch(setup, size, PROMPT_TOKENS, NUM_PASSES))
            except ChildFailed as failure:
                yield skipped(what, "pipo", str(failure).strip().replace("\n", " "))
                continue
        rates = [size / seconds for seconds in found.passes.seconds]
        one = one or median(rates)
        gain = median(rates) / one
        yield row(what, "pipo", "tok/s", rates, note=f"predicted {size / found.predicted_s:.2f} tok/s")
        yield row(what, "against one", "×", [gain], at_least(LEAST_GAIN[size]) if size in LEAST_GAIN else None)
        off = abs(median(found.passes.seconds) / found.predicted_s - 1) * 100
        yield row(what, "off its prediction", "%", [off], at_most(MOST_OFF))
        leads = list(_partings(found.answers, alone))
        note = f"{len(leads)} of {size} answers part from the lone ones" + (f", lead {max(leads):.3g}" if leads else "")
        yield row(what, "partings, not at ties", "answers", [sum(lead > TIE for lead in leads)], at_most(0), note)


def _partings(answers: Sequence[Sequence[int]], alone: Sequence[LoneAnswer]) -> Iterator[float]:
    """Where answers part from lone ones, how much likelier the lone one's token was than the next."""
    for answer, lone in zip(answers, alone, strict=False):
        for token, lone_token, lead in zip(answer, lone.token_ids, lone.leads, strict=False):
            if token != lone_token:
                yield lead
                break
