"""A plan as plain values, for JSON."""

from __future__ import annotations

from pipo.base.adapter import NamedAdapter
from pipo.plan import Plan


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
