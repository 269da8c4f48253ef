"""What an adapter adds to which products of a model, and whether it is one for this model at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipo.base.adapter import Adapter, LowRank
from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import Manifest, TensorSpec
from pipo.models.stage import Correction, Corrections, Stage, StageKind

CorrectionsOf = Callable[[Stage], Corrections]
_HEADS = ("attn_q.weight", "attn_k.weight")  # whose rows are rotated, head by head


def check_adapter(adapter: Adapter, manifest: Manifest, stages: Sequence[Stage]) -> None:
    """Raises UnsupportedModel where the adapter is for another model or asks for more than pipo runs, MalformedFile
    where a part does not fit.
    """
    architecture = manifest.hyper.architecture
    if adapter.architecture not in (None, architecture):
        raise UnsupportedModel(
            f"{adapter.path}: is an adapter for models of architecture {adapter.architecture!r:.80}, "
            f"{manifest.name} is of {architecture!r}"
        )
    matrices = {spec.name: spec for stage in _with_linears(stages) for spec in stage.matrices.values()}
    for name, part in adapter.parts.items():
        spec = matrices.get(name)
        if spec is None:
            raise _no_such_product(adapter, name, manifest, stages)
        _check_shapes(adapter, part, spec)
        if adapter.rows is not manifest.hyper.rope.layout and name.endswith("attn_qkv.weight"):
            raise UnsupportedModel(f"{adapter.path}: {name}: its rows lie in another order than the model's")


def _with_linears(stages: Sequence[Stage]) -> list[Stage]:
    """Stages that lay all their matrices by `StageBuilder.linear`."""
    return [stage for stage in stages if stage.kind in (StageKind.ATTENTION, StageKind.MLP)]


def _no_such_product(adapter: Adapter, name: str, manifest: Manifest, stages: Sequence[Stage]) -> UnsupportedModel:
    banks = [stage.bank for stage in stages if stage.bank]
    if any(spec.name == name for bank in banks for spec in bank.matrices.values()):
        return UnsupportedModel(f"{adapter.path}: {name:.80}: adapters of routed experts are not implemented")
    if name in manifest.tensors:
        return UnsupportedModel(
            f"{adapter.path}: {name:.80}: adapters of embeddings, head, routers and norms are not implemented"
        )
    return UnsupportedModel(
        f"{adapter.path}: {name:.80} is no tensor of {manifest.name}", hint="an adapter fits the model it was made for"
    )


def _check_shapes(adapter: Adapter, part: LowRank, spec: TensorSpec) -> None:
    num_in, num_out = spec.shape
    for found, wanted in ((part.a, (num_in, part.rank)), (part.b, (part.rank, num_out))):
        if found.shape != wanted:
            raise MalformedFile(
                f"{adapter.path}: tensor {found.name} has shape {found.shape}, {spec.name} of the model wants {wanted}",
                hint="an adapter fits models of the sizes it was made for",
            )


def heads_to_reorder(adapter: Adapter, name: str, manifest: Manifest) -> int:
    """Of a part whose rows of B the model has in another order than the adapter; 0 where they stay as they are."""
    hyper = manifest.hyper
    if adapter.rows is hyper.rope.layout or not name.endswith(_HEADS):
        return 0
    return hyper.num_q_heads if name.endswith(_HEADS[0]) else hyper.num_kv_heads


def corrections_of(adapters: Sequence[Adapter]) -> CorrectionsOf:
    """What these, together, add to the products of a stage."""
    factors = [adapter.factors for adapter in adapters]

    def of(stage: Stage) -> Corrections:
        found = [
            _correction(i, factors[i], role.removesuffix(".weight"), adapter.parts[spec.name])
            for i, adapter in enumerate(adapters)
            for role, spec in stage.matrices.items()
            if spec.name in adapter.parts
        ]
        return tuple(found)

    return of


def _correction(i: int, factors: Sequence[float], role: str, part: LowRank) -> Correction:
    scale = f"lora_scale.{i}.{factors.index(part.factor)}"
    return Correction(role, i, scale, part.a.type, part.b.type, part.rank)
