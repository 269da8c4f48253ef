"""How much of a window to compute at a time: in few passes much is kept of the logits, and less of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipo.base.errors import OverBudget
from pipo.generation.windows import Windows
from pipo.plan import Plan, PlanMaker

MOST_OUTPUTS = 512  # of a pass: as many as a prefill chunk has tokens at most
_MOST_WIDER = 4  # a pass without scored positions keeps no logits, and may have so many times the tokens


def plan_windows(planner: PlanMaker, windows: Windows) -> Plan:
    """With the tokens of a pass, and scored ones among them, that read least from the drive for a window.

    A prefill chunk that the planner's config names is the size of both, so that the figures depend on no budget.
    Raises OverBudget naming the smallest budget that works. Cost: 10 ms for each of up to 25 plans that are tried.
    """
    best: tuple[float, Plan] | None = None
    refusal: OverBudget | None = None
    for chunk, outputs in _shapes(planner.config.prefill_chunk, windows):
        try:
            plan = planner.reshaped(prefill_chunk=chunk, max_outputs=outputs).make(windows.size)
        except OverBudget as error:
            refusal = error
            continue
        read = _read_bytes(plan) * len(list(windows.passes(plan.placement.chunk.num_tokens, outputs)))
        if best is None or read < best[0]:
            best = read, plan
        if not read:
            break
    if best is not None:  # a window fills its context at once: nothing is lent meanwhile
        return replace(best[1], placement=replace(best[1].placement, borrowers=()))
    assert refusal is not None, "every shape fits or is refused"
    raise refusal


def _shapes(chunk: int | None, windows: Windows) -> Iterator[tuple[int, int]]:
    """(tokens of a pass, scored ones among them), the largest first."""
    most = windows.size - 1
    if chunk is not None:
        yield min(chunk, most), min(chunk, windows.scored_each)
        return
    outputs = MOST_OUTPUTS
    while outputs:
        scored, wider = min(outputs, windows.scored_each), _MOST_WIDER * outputs
        while wider >= outputs:
            if wider <= MOST_OUTPUTS:
                yield min(wider, most), scored
            wider //= 2
        outputs //= 2


def _read_bytes(plan: Plan) -> float:
    """In a pass of many tokens, which want nearly all experts."""
    placement = plan.placement
    return placement.streamed_bytes + (1 - placement.held_share) * plan.expert_bytes
