"""`pipo show`: what is in a model file, and what would live where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipo.base.units import format_size
from pipo.cli.flags import ComputeFlags, JsonFlag, MemoryFlags, ModelArgument, ModelFlag, OutputFlags, make_config
from pipo.cli.prompt import only_model

if TYPE_CHECKING:
    from pipo.base.config import EngineConfig
    from pipo.cli.terminal import Row
    from pipo.model_file import ModelFile
    from pipo.plan import Plan


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of weights. `shares` names the part whose bytes these are."""

    name: str
    num_bytes: int
    types: tuple[str, ...]
    shares: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan, and the smallest budget for its context."""

    plan: Plan
    smallest_bytes: int


def show(
    model: ModelArgument = None,
    model_flag: ModelFlag = None,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
) -> None:
    """Show what is in a model's files. Reads headers only.

    With --ram, or another flag of memory: also what would stay in RAM and what would stream.
    """
    name = only_model(model, model_flag)
    config = make_config(memory, ComputeFlags())

    from pipo.cli.session import open_model
    from pipo.cli.terminal import write_json

    opened = open_model(name, config.ram if memory.is_given else None)
    if json:
        fit = _fit_dict(_fit(opened, config, output)) if memory.is_given else None
        write_json(_model_dict(opened) | {"plan": fit})
        return
    _print_model(opened, config)
    if memory.is_given:
        _print_fit(_fit(opened, config, output), config)


def parts_of(model: ModelFile) -> list[Part]:
    """The weights by what they do, in the order of a pass."""
    from pipo.base.manifest import EMBEDDING_TABLE
    from pipo.models.stage import StageKind, banks_of

    embedding = model.manifest.tensors[EMBEDDING_TABLE]
    parts = [Part("embedding", embedding.num_bytes, (embedding.type.name,))]
    for kind, name in ((StageKind.ATTENTION, "attention"), (StageKind.MLP, "MLP"), (StageKind.HEAD, "head")):
        specs = [spec for stage in model.stages if stage.kind is kind for spec in stage.matrices.values()]
        types = tuple(dict.fromkeys(spec.type.name for spec in specs))
        is_shared = all(spec.extent == embedding.extent for spec in specs)
        parts.append(Part(name, sum(s.num_bytes for s in specs), types, "embedding" if is_shared else None))
    experts = [spec for bank in banks_of(model.stages) for spec in bank.matrices.values()]
    if experts:
        types = tuple(dict.fromkeys(spec.type.name for spec in experts))
        parts.insert(3, Part("experts", sum(spec.num_bytes for spec in experts), types))
        parts = [part for part in parts if part.num_bytes]
    vectors = {spec.name: spec for stage in model.stages for spec in stage.vectors.values()}.values()
    types = tuple(dict.fromkeys(spec.type.name for spec in vectors))
    return [*parts, Part("norms and routers" if experts else "norms", sum(s.num_bytes for s in vectors), types)]


def _fit(model: ModelFile, config: EngineConfig, output: OutputFlags) -> Fit:
    from pipo.cli.session import starting
    from pipo.engine import Engine

    with Engine(model, config) as engine:
        with starting(output):
            plan = engine.make_plan()
        return Fit(plan, engine.smallest_ram_bytes(plan.context_tokens))


def _print_model(model: ModelFile, config: EngineConfig) -> None:
    from pipo.cli.session import model_title
    from pipo.cli.terminal import print_columns, print_rows, stdout

    print_rows(stdout(), model_title(model), _model_rows(model, config))
    whole = model.manifest.num_bytes
    stdout().print()
    lines = [
        (p.name, format_size(p.num_bytes), f"{p.num_bytes / whole:.0%}", " ".join(p.types))
        if p.shares is None
        else (p.name, "", "", f"shares the {p.shares}")
        for p in parts_of(model)
    ]
    print_columns(stdout(), ("part", "size", "share", "types"), lines, indent="  ")


def _model_rows(model: ModelFile, config: EngineConfig) -> Iterator[Row]:
    hyper = model.manifest.hyper
    for file in model.manifest.files:
        yield "file", str(file)
    heads = f"{hyper.num_q_heads} heads of {hyper.head_dim}"
    if hyper.num_kv_heads != hyper.num_q_heads:
        heads += f", {hyper.num_kv_heads} for keys and values"
    yield "blocks", f"{hyper.num_layers}, hidden {hyper.hidden_size}, MLP {hyper.intermediate_size}, {heads}"
    if hyper.num_experts:
        yield "experts", f"{hyper.num_experts} a block, of which a token passes {hyper.num_experts_per_tok}"
    types = dict.fromkeys((config.cache_type_k, config.cache_type_v))
    per_token = format_size(kv_bytes_per_token(model, config))
    yield "context", f"{hyper.context_tokens} tokens, {per_token} of KV cache each in {' and '.join(types)}"
    yield "tokenizer", f"{model.tokenizer.name}, {model.tokenizer.vocab_size} tokens"
    yield "chat", "has a template" if has_template(model) else "no template: use --raw"


def kv_bytes_per_token(model: ModelFile, config: EngineConfig) -> float:
    from pipo.kvcache.cache import CACHE_TYPES, kv_shape

    types = CACHE_TYPES[config.cache_type_k], CACHE_TYPES[config.cache_type_v]
    shape = kv_shape(model.manifest.hyper, model.manifest.hyper.context_tokens, *types, pass_tokens=1)
    return shape.used_bytes(shape.num_rows) / shape.num_rows


def has_template(model: ModelFile) -> bool:
    from pipo.text.chat_template import TEMPLATE_KEY

    return model.checkpoint.metadata.get(TEMPLATE_KEY) is not None


def _print_fit(fit: Fit, config: EngineConfig) -> None:
    from pipo.cli.report import breakdown_rows, plan_rows
    from pipo.cli.terminal import print_columns, print_rows, stdout
    from pipo.planner.placement import smallest_ram_text

    stdout().print()
    rows = [*plan_rows(fit.plan), ("smallest", f"--ram {smallest_ram_text(fit.smallest_bytes)} for this context")]
    print_rows(stdout(), f"with --ram {config.ram}", rows)
    stdout().print()
    lines = [*breakdown_rows(fit.plan.placement.breakdown)]
    print_columns(stdout(), ("memory", "size"), lines, indent="  ")


def _model_dict(model: ModelFile) -> dict[str, object]:
    from pipo.cli.session import bytes_by_type

    manifest, hyper = model.manifest, model.manifest.hyper
    return {
        "name": manifest.name,
        "files": [str(file) for file in manifest.files],
        "bytes": manifest.num_bytes,
        "architecture": hyper.architecture,
        "num_layers": hyper.num_layers,
        "hidden_size": hyper.hidden_size,
        "intermediate_size": hyper.intermediate_size,
        "num_q_heads": hyper.num_q_heads,
        "num_kv_heads": hyper.num_kv_heads,
        "head_dim": hyper.head_dim,
        "vocab_size": hyper.vocab_size,
        "num_experts": hyper.num_experts,
        "num_experts_per_tok": hyper.num_experts_per_tok,
        "context_tokens": hyper.context_tokens,
        "bytes_by_type": bytes_by_type(model),
        "parts": {p.name: {"bytes": p.num_bytes, "types": list(p.types), "shares": p.shares} for p in parts_of(model)},
        "tokenizer": model.tokenizer.name,
        "has_chat_template": has_template(model),
    }


def _fit_dict(fit: Fit) -> dict[str, object]:
    from pipo.plan_facts import plan_dict
    from pipo.planner.placement import smallest_ram_text

    smallest = {"smallest_bytes": fit.smallest_bytes, "smallest_ram": smallest_ram_text(fit.smallest_bytes)}
    return plan_dict(fit.plan) | smallest
