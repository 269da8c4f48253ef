"""A plan before an answer and its cost after, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipo.answering import Report
from pipo.base.adapter import NamedAdapter
from pipo.base.units import format_rate, format_size
from pipo.cli.terminal import Row
from pipo.pipeline.device_share import DeviceShare
from pipo.pipeline.expert_stats import BlockStats, ExpertStats
from pipo.pipeline.stats import PassStats
from pipo.plan import Plan
from pipo.planner.simulate import Lane

LANE_NAMES = {
    Lane.DRIVE: "drive", Lane.CPU: "CPU", Lane.UPLOAD: "copies to the device", Lane.DEVICE: "device",
    Lane.DOWNLOAD: "copies back",
}  # fmt: skip


def plan_rows(plan: Plan) -> Iterator[Row]:
    """What lives where, and what that costs per pass."""
    placement = plan.placement
    yield "weights", weights_text(plan)
    if placement.num_experts:
        yield "experts", _experts_text(plan)
    yield "memory", f"{format_size(placement.num_bytes)} planned, the limit is {format_size(plan.limit_bytes)}"
    config = plan.blueprint.config
    types = " and ".join(dict.fromkeys((config.cache_type_k, config.cache_type_v)))
    each = f" for each of {config.num_sequences} sequences" if config.num_sequences > 1 else ""
    yield "context", f"{plan.context_tokens} tokens{each}, {format_size(_kv_bytes(plan))} of KV cache in {types}"
    for i, named in enumerate(plan.adapters):
        yield "adapters" if i == 0 else "", _adapter_text(named)
    if plan.device is not None:
        yield "device", _device_text(plan.device, plan.blueprint.config.num_sequences)
    yield "prefill", f"{placement.chunk.num_tokens} tokens a pass, {layout_text(plan)}"
    if plan.decode_threads:
        yield "decode", f"on {plan.decode_threads} of {config.num_threads} threads, which leaves a core to the drive"


def layout_text(plan: Plan) -> str:
    if not plan.repacked_types:
        return "plain weights"
    where = f" from {plan.native_file.name}" if plan.native_file else ""
    return f"repacked {', '.join(plan.repacked_types)} weights{where}"


def _adapter_text(named: NamedAdapter) -> str:
    adapter = named.adapter
    size, parts = format_size(adapter.num_bytes), len(adapter.parts)
    return f"{named.id}: {adapter.rank_text}, scale {named.scale:g}, {parts} matrices, {size}"


def start_rows(plan: Plan) -> Iterator[Row]:
    """What is said before an answer."""
    yield from plan_rows(plan)
    yield from prediction_rows(plan)


def _kv_bytes(plan: Plan) -> int:
    """Wherever they live; what they pass through on a device is not counted twice."""
    share = plan.device.placement if plan.device else None
    there = share.kv_bytes if share and not share.moves_kv else 0
    return plan.placement.breakdown["KV cache"] + there


def _device_text(share: DeviceShare, num_sequences: int) -> str:
    placement, device = share.placement, share.device
    text = (
        f"{device.name} computes {len(share.blocks)} blocks and the head, {format_size(placement.resident_bytes)} stay"
    )
    if placement.streamed_bytes:
        text += f", {format_size(placement.streamed_bytes)} are copied in every pass"
    kept = "keys and values move" if placement.moves_kv else "keys and values stay"
    if 0 < placement.kv_sequences < num_sequences:
        kept += f" for {placement.kv_sequences} of {num_sequences} sequences at a time"
    return f"{text}, {kept}; {format_size(placement.num_bytes)} planned of {format_size(share.limit_bytes)}"


def weights_text(plan: Plan) -> str:
    total, streamed = plan.weight_bytes, plan.in_use.streamed_bytes
    if plan.device is not None:
        return _weights_with_device_text(plan, plan.device)
    if plan.placement.num_experts:
        total -= plan.expert_bytes
    if not streamed and plan.placement.num_experts:
        return f"all {format_size(total)} besides routed experts stay in RAM{_borrowed_text(plan)}"
    if not streamed:
        return f"all {format_size(total)} stay in RAM, nothing streams from disk{_borrowed_text(plan)}"
    resident = total - streamed
    stay = f"{format_size(resident) if resident > 0 else 'none'} stay in RAM"
    return f"{part_text(streamed, total)} stream from disk in every pass, {stay}{_borrowed_text(plan)}"


def _experts_text(plan: Plan) -> str:
    placement, hyper = plan.placement, plan.blueprint.manifest.hyper
    num_blocks = placement.num_experts // hyper.num_experts
    passes = f"a token passes {hyper.num_experts_per_tok} of {hyper.num_experts} in each of {num_blocks} blocks"
    all_bytes = format_size(plan.expert_bytes)
    if not placement.misses_experts:
        return f"all {placement.num_experts} fit, {all_bytes}, and are read when they are wanted first; {passes}"
    fitting = f"{placement.num_expert_slots} of {placement.num_experts}, {all_bytes} in all, are in RAM at a time"
    return f"{fitting}; {passes}"


def routing_rows(plan: Plan) -> Iterator[Row]:
    """What the prediction takes a mixture's routing to be, where that decides what is read."""
    prediction = plan.prediction
    if prediction is not None and prediction.routing is not None and plan.placement.misses_experts:
        read = format_size(prediction.expert_bytes)
        yield "routing", f"{prediction.routing.source}: {read} of experts are read for a pass of decode"


def _borrowed_text(plan: Plan) -> str:
    """What stays only for as long as the context is short."""
    borrowed = plan.in_use.resident_bytes - plan.placement.resident_bytes
    return f", {format_size(borrowed)} of them until the context needs the room" if borrowed else ""


def _weights_with_device_text(plan: Plan, share: DeviceShare) -> str:
    total, streamed = plan.weight_bytes, plan.in_use.streamed_bytes
    in_ram, there = format_size(plan.in_use.resident_bytes), format_size(share.placement.resident_bytes)
    homes = f"{in_ram} stay in RAM{_borrowed_text(plan)}, {there} on {share.device.name}"
    return (
        f"{part_text(streamed, total)} stream from disk in every pass, {homes}"
        if streamed
        else f"{homes}, nothing streams from disk"
    )


def predicted_tokens_per_s(plan: Plan) -> float | None:
    """Of decode; where nothing was measured, what the drive allows, and None where nothing streams."""
    if plan.prediction is not None:
        return plan.prediction.tokens_per_s
    return 1 / plan.pass_floor_s if plan.is_streaming else None


def prediction_rows(plan: Plan) -> Iterator[Row]:
    """What to expect, and what limits it."""
    rate = predicted_tokens_per_s(plan)
    if rate is None:
        return
    if plan.prediction is None:
        yield "expect", f"{rate_text(rate)} tokens/s at most, which the drive allows"
        return
    decode, ttft_s = plan.prediction.decode, plan.prediction.ttft_s
    yield from routing_rows(plan)
    shares = ", ".join(f"{name} {decode.share(lane):.0%}" for lane, name in LANE_NAMES.items() if decode.busy[lane])
    yield "expect", f"{rate_text(rate)} tokens/s, first token after {seconds_text(ttft_s)}; busy: {shares}"


def breakdown_rows(breakdown: Mapping[str, int]) -> Iterator[Row]:
    for name, num_bytes in sorted(breakdown.items(), key=lambda item: -item[1]):
        if num_bytes:
            yield name, format_size(num_bytes)


def status_line(plan: Plan, report: Report) -> str:
    """One line on what the answer cost."""
    decode = report.decode
    parts = []
    if decode.num_passes:
        predicted = f" ({rate_text(plan.prediction.tokens_per_s)} predicted)" if plan.prediction else ""
        parts.append(f"{rate_text(report.tokens_per_s)} tok/s{predicted}")
    parts.append(f"first token {seconds_text(report.timing.ttft_s)}")
    if decode.num_passes and decode.bytes_read:
        parts.append(
            f"{format_size(bytes_per_token(report))}/token at {format_rate(decode.bytes_per_s)}, "
            f"{drive_share(plan, report):.0%} of the drive"
        )
        parts.append(f"stalled {decode.stall_share:.0%}")
        if decode.experts is not None:
            parts.append(f"{decode.experts.hit_rate:.1%} of experts there or foretold")
    parts.append(f"peak {part_text(report.peak_anonymous_bytes, plan.limit_bytes)}")
    return " · ".join(parts)


def detail_rows(report: Report) -> Iterator[Row]:
    """What --verbose and /stats add."""
    timing = report.timing
    cached = f", {timing.cached_tokens} were in the KV cache" if timing.cached_tokens else ""
    rate = timing.prefill_tokens / report.prefill.wall_s if report.prefill.wall_s else 0.0
    yield "prefill", f"{timing.prefill_tokens} tokens at {rate_text(rate)} tok/s{cached}; {stats_text(report.prefill)}"
    yield "decode", f"{report.num_generated} tokens; {stats_text(report.decode)}"
    if report.decode.experts is not None and report.decode.experts.total.num_needed:
        yield "experts", _expert_stats_text(report.decode.experts.total)


def _expert_stats_text(total: BlockStats) -> str:
    """Of decode, all blocks together."""
    num = total.num_needed
    text = (
        f"{num} needed: {total.num_hits / num:.1%} were in RAM, {total.num_guessed / num:.1%} had been asked for one "
        f"block ahead, {total.num_missed / num:.1%} were missed"
    )
    if total.precision is None or total.recall is None:
        return text
    return (
        f"{text}; {total.precision:.0%} of what was foretold was needed, {total.recall:.0%} of what was needed foretold"
    )


def report_dict(plan: Plan, report: Report) -> dict[str, object]:
    return {
        "tokens_per_s": report.tokens_per_s,
        "predicted_tokens_per_s": plan.prediction.tokens_per_s if plan.prediction else None,
        "predicted_ttft_s": plan.prediction.ttft_s if plan.prediction else None,
        "ttft_s": report.timing.ttft_s,
        "bytes_per_token": bytes_per_token(report),
        "drive_share": drive_share(plan, report),
        "peak_anonymous_bytes": report.peak_anonymous_bytes,
        "prefill": stats_dict(report.prefill),
        "decode": stats_dict(report.decode),
    }


def bytes_per_token(report: Report) -> float:
    decode = report.decode
    return decode.bytes_read / decode.num_tokens if decode.num_tokens else 0.0


def drive_share(plan: Plan, report: Report) -> float:
    """Of the drive's measured rate, 0 to 1; more where a cache below it helped."""
    return report.decode.bytes_per_s / plan.drive.bytes_per_s


def stats_text(stats: PassStats) -> str:
    causes = ", ".join(f"{cause.value} {seconds:.2f} s" for cause, seconds in stats.stall_s.items() if seconds >= 0.005)
    stalls = f"stalled {stats.total_stall_s:.2f} s ({causes})" if causes else "no stalls"
    passes = "1 pass" if stats.num_passes == 1 else f"{stats.num_passes} passes"
    return (
        f"{passes} in {stats.wall_s:.2f} s, computing {stats.compute_s:.2f} s, {stalls}; "
        f"{format_size(stats.bytes_read)} in {stats.num_reads} reads"
    )


def stats_dict(stats: PassStats) -> dict[str, object]:
    return {
        "num_passes": stats.num_passes,
        "num_tokens": stats.num_tokens,
        "num_reads": stats.num_reads,
        "bytes_read": stats.bytes_read,
        "bytes_per_s": stats.bytes_per_s,
        "wall_s": stats.wall_s,
        "compute_s": stats.compute_s,
        "stall_s": {cause.value: seconds for cause, seconds in stats.stall_s.items()},
        "stall_share": stats.stall_share,
        "experts": None if stats.experts is None else _expert_stats_dict(stats.experts),
    }


def _expert_stats_dict(stats: ExpertStats) -> dict[str, object]:
    def block(counts: BlockStats) -> dict[str, object]:
        return {
            "num_needed": counts.num_needed,
            "num_hits": counts.num_hits,
            "num_guessed": counts.num_guessed,
            "num_missed": counts.num_missed,
            "precision": counts.precision,
            "recall": counts.recall,
        }

    return block(stats.total) | {"blocks": [block(each) for each in stats.blocks]}


def part_text(part_bytes: float, whole_bytes: float) -> str:
    """`"77.0 of 98.1 MiB"`: the unit once where it is the same."""
    part, whole = format_size(part_bytes), format_size(whole_bytes)
    number, unit = part.split()
    return f"{number} of {whole}" if whole.endswith(unit) else f"{part} of {whole}"


def rate_text(per_s: float) -> str:
    """Three digits: `0.123`, `4.56`, `78.9`, `1234`."""
    digits = 3 if per_s < 1 else 2 if per_s < 10 else 1 if per_s < 100 else 0
    return f"{per_s:.{digits}f}"


def seconds_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
