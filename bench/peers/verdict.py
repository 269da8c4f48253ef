"""The rows of a contest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from bench.messages import FirstToken, Passes
from bench.peers.contest import BATCH, Score
from bench.peers.seat import GREEDY_TOKENS, Seat
from bench.rows import Row, Target, at_least, at_most, row, skipped
from pipo.base.units import MIB, format_size

LEAST_OF_LIMIT = 95.0  # % of what drive and compute allow
LEAST_AHEAD = {"accelerate": 4.0, "AirLLM": 5.0}  # of these, at half the model
LEAST_OF_RESIDENT_PEER = 0.95
_HALF = 0.5
_NOT_REACHED = "not reached: the run was ended"


def rows_of(score: Score, share: float) -> Iterator[Row]:
    yield skipped("plan", "pipo", _plan_text(score))
    if score.drive:
        yield from score.drive.rows()
    if score.resident and score.resident.turns:
        yield row("decode", "pipo resident", "s", _seconds(score.resident), note="no limit: what computing alone takes")
    yield from _seat_rows(score.pipo, score)
    yield from _limit_rows(score)
    for peer in score.peers:
        yield from _seat_rows(peer, score)
        yield from _lead_rows(peer, score, share)
    yield row("peak anonymous ÷ budget", "pipo", "×", [score.pipo.peak_anonymous_bytes / score.ram_bytes], at_most(1))


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = zip(ours, theirs, strict=False)
    return next((idx for idx, (own, their) in enumerate(pairs) if own != their), min(len(ours), len(theirs)))


def _plan_text(score: Score) -> str:
    facts = score.facts
    resident, streamed = format_size(facts.resident_bytes), format_size(facts.streamed_bytes)
    layout = ", ".join(facts.repacked_types) or "none"
    return f"--ram {format_size(score.ram_bytes)}: {resident} resident, {streamed} a pass, repacked {layout}"


def _seconds(seat: Seat) -> list[float]:
    return [second for turn in seat.turns for second in turn.passes.seconds]


def _seat_rows(seat: Seat, score: Score) -> Iterator[Row]:
    if not seat.turns:
        yield skipped("decode", seat.title, seat.failure or _NOT_REACHED)
        return
    yield row("decode", seat.title, "s", _seconds(seat), note=_note(seat))
    yield row("read a token", seat.title, "GB", [turn.bytes_read / 1e9 for turn in seat.turns])
    pairs = zip(seat.turns, score.raw, strict=False)
    rates = [turn.bytes_read / turn.seconds / raw * 100 for turn, raw in pairs]
    if rates:
        yield row("of the drive", seat.title, "%", rates)
    yield from _prompt_rows(seat)
    yield from _batch_rows(seat)
    charged = f"{seat.peak_charged_bytes / MIB:.0f} MiB with page cache"
    yield row("peak anonymous", seat.title, "MiB", [seat.peak_anonymous_bytes / MIB], note=charged)
    if seat is not score.pipo:
        same = common_prefix(score.pipo.token_ids, seat.token_ids)
        yield row("same tokens", seat.title, "", [same], note=f"of {GREEDY_TOKENS}, from the first one")


def _note(seat: Seat) -> str:
    causes = {cause for turn in seat.turns for cause, _ in turn.passes.stall_s}
    shares = " · ".join(f"{cause} {_share(seat, cause):.0f} %" for cause in sorted(causes))
    failure = "" if seat.failure in (seat.prompt, seat.batch) else seat.failure  # those have rows of their own
    return " · ".join(part for part in (seat.footnote, seat.library, shares, failure) if part)


def _share(seat: Seat, cause: str) -> float:
    """Of the time for decoding, in percent."""
    lost_s = sum(dict(turn.passes.stall_s).get(cause, 0.0) for turn in seat.turns)
    return lost_s / sum(_seconds(seat)) * 100


def _prompt_rows(seat: Seat) -> Iterator[Row]:
    answer = seat.prompt
    if isinstance(answer, FirstToken):
        yield row(
            "prompt", seat.title, "tok/s", [answer.num_tokens / answer.seconds], note=f"{answer.num_tokens} tokens"
        )
    else:
        yield skipped("prompt", seat.title, answer or _NOT_REACHED)


def _batch_rows(seat: Seat) -> Iterator[Row]:
    metric = f"batch of {BATCH}"
    if isinstance(seat.batch, Passes):
        yield row(metric, seat.title, "tok/s", [BATCH / second for second in seat.batch.seconds])
    else:
        yield skipped(metric, seat.title, seat.batch or _NOT_REACHED)


def _limit_rows(score: Score) -> Iterator[Row]:
    if not score.raw or score.resident is None or not score.resident.turns or not score.pipo.turns:
        return
    compute_s = median(_seconds(score.resident))
    pairs = list(zip(score.pipo.turns, score.raw, strict=False))
    floors = [max(score.facts.streamed_bytes / raw, compute_s) for _, raw in pairs]
    shares = [floor / turn.seconds * 100 for floor, (turn, _) in zip(floors, pairs, strict=True)]
    note = f"max(streamed ÷ raw rate, compute {compute_s:.3g} s) = {median(floors):.3g} s"
    yield row("of the limit", "pipo", "%", shares, at_least(LEAST_OF_LIMIT), note)


def _lead_rows(peer: Seat, score: Score, share: float) -> Iterator[Row]:
    """How many times faster, by pairs of a round; for a mapped file beside what nobody could beat."""
    pairs = list(zip(peer.turns, score.pipo.turns, strict=False))
    if not pairs:
        return
    leads = [their.seconds / own.seconds for their, own in pairs]
    yield row(f"ahead of {peer.title}", "pipo", "×", leads, _lead_target(peer, share))
    if peer.title == "llama.cpp mapped" and score.raw and score.resident and score.resident.turns:
        compute_s = median(_seconds(score.resident))
        left_bytes = max(score.facts.weight_bytes - score.ram_bytes, 0)
        perfect = [t.seconds / max(left_bytes / raw, compute_s) for t, raw in zip(peer.turns, score.raw, strict=False)]
        note = f"keeps all of its budget in weights, reads {format_size(left_bytes)} a pass at the drive's rate"
        yield row(f"ahead of {peer.title}", "a perfect engine", "×", perfect, note=note)


def _lead_target(peer: Seat, share: float) -> Target | None:
    if share > 1 and peer.title.startswith("llama.cpp"):
        return at_least(LEAST_OF_RESIDENT_PEER)
    if share == _HALF and peer.title in LEAST_AHEAD:
        return at_least(LEAST_AHEAD[peer.title])
    return None
