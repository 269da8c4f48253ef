"""A plan as plain values, for JSON."""

from __future__ import annotations

from dataclasses import asdict

from pipo.base.adapter import NamedAdapter
from pipo.model_file import ModelFile
from pipo.plan import Plan
from pipo.planner.batch import busiest
from pipo.planner.predict import Prediction
from pipo.planner.simulate import Lane


def plan_dict(plan: Plan) -> dict[str, object]:
    placement = plan.placement
    return {
        "limit_bytes": plan.limit_bytes,
        "planned_bytes": placement.num_bytes,
        "breakdown_bytes": placement.breakdown,
        "weight_bytes": plan.weight_bytes,
        "streamed_bytes_per_pass": plan.in_use.streamed_bytes,
        "streamed_bytes_per_pass_when_full": placement.streamed_bytes,
        "context_tokens": plan.context_tokens,
        "prefill_chunk": placement.chunk.num_tokens,
        "decode_threads": plan.decode_threads or plan.blueprint.config.num_threads,
        "repacked_types": list(plan.repacked_types),
        "native_file": str(plan.native_file) if plan.native_file else None,
        "drive_bytes_per_s": plan.drive.bytes_per_s,
        "experts": _experts_dict(plan) if placement.num_experts else None,
        "adapters": [_adapter_dict(named) for named in plan.adapters],
    }


def _adapter_dict(named: NamedAdapter) -> dict[str, object]:
    ranks = {part.rank for part in named.adapter.parts.values()}
    return {
        "id": named.id,
        "path": str(named.adapter.path),
        "scale": named.scale,
        "ranks": sorted(ranks),
        "num_matrices": len(named.adapter.parts),
        "bytes": named.adapter.num_bytes,
    }


def _experts_dict(plan: Plan) -> dict[str, object]:
    prediction = plan.prediction
    return {
        "num_experts": plan.placement.num_experts,
        "num_slots": plan.placement.num_expert_slots,
        "bytes": plan.expert_bytes,
        "predicted_bytes_per_pass": prediction.expert_bytes if prediction else None,
        "routing": prediction.routing.source if prediction and prediction.routing else None,
    }


def homed_plan_dict(model: ModelFile, plan: Plan) -> dict[str, object]:
    """With every unit's home."""
    return plan_dict(plan) | {"units": _homes(model, plan), "device": _device_dict(plan)}


def served_plan_dict(model: ModelFile, plan: Plan) -> dict[str, object]:
    """As `pipo plan --json` says it, of a plan that an engine follows."""
    workload = prediction = None
    if plan.prediction is not None:
        workload = asdict(plan.prediction.workload)
        lane = busiest(plan.prediction).value
        prediction = prediction_dict(plan.prediction) | {"limit": {"lane": lane, "text": lane}}
    return {
        "model": model.manifest.name,
        "workload": workload,
        "plan": homed_plan_dict(model, plan),
        "prediction": prediction,
    }


def prediction_dict(prediction: Prediction) -> dict[str, object]:
    return {
        "ttft_s": prediction.ttft_s,
        "tokens_per_s": prediction.tokens_per_s,
        "total_s": prediction.total_s,
        "pass_s": prediction.decode.seconds,
        "busy": {lane.value: prediction.decode.share(lane) for lane in Lane},
    }


def _homes(model: ModelFile, plan: Plan) -> list[dict[str, str | int | bool | None]]:
    """Of every unit in the order of a pass: where it lives, and what computes with it."""
    share = plan.device.placement if plan.device else None
    homes: list[dict[str, str | int | bool | None]] = []
    in_ram = plan.in_use.resident
    stages = [stage for stage in model.stages if stage.matrices]
    for i, stage in enumerate(stages):
        computes = share is not None and share.computes[i]
        is_there = share is not None and share.resident[i]
        home = "device" if is_there else "ram" if in_ram[i] else "disk"
        homes.append(
            {
                "stage": stage.kind.value,
                "block": stage.block_idx if stage.block_idx >= 0 else None,
                "home": home,
                "until_context_fills": home == "ram" and not plan.placement.resident[i],
                "computes_on": "device" if computes else "cpu",
            }
        )
    return homes


def _device_dict(plan: Plan) -> dict[str, object] | None:
    share = plan.device
    if share is None:
        return None
    return {
        "name": share.device.name,
        "limit_bytes": share.limit_bytes,
        "planned_bytes": share.placement.num_bytes,
        "breakdown_bytes": share.placement.breakdown,
        "num_blocks": len(share.blocks),
        "copied_bytes_per_pass": share.placement.streamed_bytes,
        "moves_kv": share.placement.moves_kv,
        "kv_sequences_at_a_time": share.placement.kv_sequences or plan.blueprint.config.num_sequences,
    }
