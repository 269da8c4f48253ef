"""Stages as the planner's arithmetic sees them: elements, bytes, types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipo.base.adapter import Adapter
from pipo.base.machine import StageWork, WeightWork
from pipo.base.manifest import HyperParameters, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.models.stage import ExpertBank, Stage, StageKind
from pipo.pipeline.expert_units import expert_bytes
from pipo.pipeline.units import WeightLayouts, weight_bytes
from pipo.planner.cost import StageCost
from pipo.planner.experts import ExpertWork
from pipo.planner.residency import UnitId

CacheTypes = tuple[TensorType, TensorType]  # of keys and of values


def stage_costs(
    stages: Sequence[Stage],
    layouts: WeightLayouts,
    hyper: HyperParameters,
    cache_types: CacheTypes,
    adapters: Sequence[Adapter] = (),
) -> list[StageCost]:
    """One per stage, in order; those with matrices are numbered as units, as `unit_sizes` has them. What adapters add
    is counted with their products.
    """
    costs = []
    num_units = 0
    for stage in stages:
        unit_id = UnitId(num_units) if stage.matrices else None
        num_units += bool(stage.matrices)
        cost = _cost(stage, unit_id, layouts, hyper, cache_types)
        costs.append(replace(cost, work=_with_adapters(cost.work, stage, adapters)))
    return costs


def _with_adapters(work: StageWork, stage: Stage, adapters: Sequence[Adapter]) -> StageWork:
    names = [spec.name for spec in stage.matrices.values()]
    parts = [adapter.parts[name] for adapter in adapters for name in names if name in adapter.parts]
    more = _work_of([spec for part in parts for spec in (part.a, part.b)], WeightLayouts(frozenset()))
    activations = work.activations_per_token + more.activations_per_token
    return replace(work, weights=work.weights + more.weights, activations_per_token=activations)


def _cost(
    stage: Stage, unit_id: UnitId | None, layouts: WeightLayouts, hyper: HyperParameters, cache_types: CacheTypes
) -> StageCost:
    repacked = [spec.type for spec in stage.matrices.values() if layouts.repacks(spec)]
    attends = stage.kind is StageKind.ATTENTION
    kv_size = hyper.num_kv_heads * hyper.head_dim
    return StageCost(
        work=_work(stage, layouts, hyper, cache_types if attends else ()),
        unit_id=unit_id,
        unit_bytes=weight_bytes(stage),
        repacked_as=repacked[0] if repacked else None,
        kv_bytes_per_position=sum(type_.row_bytes(kv_size) for type_ in cache_types) if attends else 0,
        is_head=stage.kind is StageKind.HEAD,
        experts=None if stage.bank is None else _experts(stage.bank, layouts),
    )


def _experts(bank: ExpertBank, layouts: WeightLayouts) -> ExpertWork:
    one = list(bank.expert(0).values())
    repacked = [spec.type for spec in one if layouts.repacks(spec)]
    return ExpertWork(
        _work_of(one, layouts), expert_bytes(bank), repacked[0] if repacked else None, bank.num_experts,
        bank.num_experts_per_tok,
    )  # fmt: skip


def _work(stage: Stage, layouts: WeightLayouts, hyper: HyperParameters, cached: Sequence[TensorType]) -> StageWork:
    """Routers are among the vectors, and no other vector is multiplied."""
    routers = [spec for role, spec in stage.vectors.items() if role.endswith("ffn_gate_inp.weight")]
    work = _work_of([*stage.matrices.values(), *routers], layouts)
    q_size = hyper.num_q_heads * hyper.head_dim
    return replace(work, cache_per_position=tuple((type_, q_size) for type_ in cached))


def _work_of(specs: Sequence[TensorSpec], layouts: WeightLayouts) -> StageWork:
    weights = []
    activations = 0
    for spec in specs:
        size_in, size_out = spec.shape
        weights.append(WeightWork(spec.type, size_in * size_out, layouts.is_repacked(spec.name)))
        activations += size_in + size_out
    return StageWork(tuple(weights), activations)
