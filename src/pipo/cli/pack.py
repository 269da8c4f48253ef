"""`pipo pack`: quantise a model into a file laid out for streaming."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.units import format_rate, format_size
from pipo.cli.flags import ComputeFlags, JsonFlag, MemoryFlags, ModelArgument, ModelFlag, OutputFlags, make_config
from pipo.cli.prompt import only_model

if TYPE_CHECKING:
    from pipo.base.manifest import Manifest
    from pipo.compute.ggml import Library
    from pipo.formats.checkpoint import Checkpoint
    from pipo.packing.pack import PackReport
    from pipo.packing.plan import PackPlan
    from pipo.packing.types import Mix

# `Model.Q4_K_M`, `model-f16`: what a name says of the type goes, the new one comes
_TYPE_SUFFIX = re.compile(r"[.-](?:i?q\d\w*|b?f16|f32|mxfp4)$", re.IGNORECASE)
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_MAX_NAMED = 3
_LAYOUTS = ("plain", "native")


def pack(
    model: ModelArgument = None,
    model_flag: ModelFlag = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="q4_0, q4_k_m, q8_0, f16, …: what most weights become."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(metavar="|".join(_LAYOUTS), help="native: also, beside the file, what this CPU's kernels want."),
    ] = "plain",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to; MODEL.TYPE.gguf in this folder otherwise."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE where it is there already.")] = False,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE|PERCENT|auto", help="Memory of the whole process, as for `run`.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, metavar="N", help="Threads that convert; one per core.")
    ] = None,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
) -> None:
    """Quantise a model into one GGUF, laid out in the order of a pass and with checksums.

    MODEL may be a Hugging Face folder. llama.cpp reads what comes out. What was interrupted is continued by the same
    command. `--layout native` without a type writes beside MODEL as it is, also where only that was interrupted.
    """
    from pipo.base.errors import UsageError
    from pipo.packing.types import MIXES, parse_mix

    name, is_native = only_model(model, model_flag), layout == "native"
    if layout not in _LAYOUTS:
        raise UsageError(f"--layout {layout!r:.80} is not known", hint=f"one of {', '.join(_LAYOUTS)}")
    if type_ is None and not is_native:
        raise UsageError("which type?", hint=f"--type {'|'.join(MIXES)}")
    if type_ is None and out is not None:
        raise UsageError("-o names a file of another type", hint="--type says which; without it, leave -o out")
    mix = None if type_ is None else parse_mix(type_)
    config = make_config(MemoryFlags(ram=ram), ComputeFlags(threads=threads))

    from pipo.cli.terminal import write_json
    from pipo.compute import ggml
    from pipo.formats.checkpoint import open_checkpoint
    from pipo.hardware.budget import ram_bytes
    from pipo.models.registry import check_architecture
    from pipo.store.library import resolve_model

    checkpoint = open_checkpoint(resolve_model(name), check_architecture)
    packing = _Packing(ggml.load(), ram_bytes(config.ram), config.num_threads, output, overwrite, json)
    report: dict[str, object] = {}
    if mix is not None:
        path = out or Path(default_name(checkpoint.manifest, mix.name))
        report = packing.quantise(checkpoint, mix, path, is_native=is_native)
        checkpoint = open_checkpoint(path, check_architecture) if is_native else checkpoint
    native = packing.repack(checkpoint) if is_native else {}
    if json:
        write_json(report | {"native": native} if report and native else report or native)


@dataclass(frozen=True, slots=True)
class _Packing:
    """What the files of one command have in common."""

    lib: Library
    limit_bytes: int
    num_threads: int
    output: OutputFlags
    overwrite: bool
    json: bool

    def quantise(self, checkpoint: Checkpoint, mix: Mix, path: Path, *, is_native: bool) -> dict[str, object]:
        from pipo.model_file import gguf_text_of_folder
        from pipo.packing.native import check_gain
        from pipo.packing.plan import check_output, plan_pack

        hint = f"`pipo pack {path} --layout native` writes what is missing beside it" if is_native else None
        check_output(path, checkpoint.manifest, overwrite=self.overwrite, hint=hint)
        text = gguf_text_of_folder(checkpoint, self.limit_bytes)
        entries, losses = ([], ()) if text is None else (text.entries, text.losses)
        plan = plan_pack(checkpoint, mix, self.lib, self.limit_bytes, self.num_threads, entries)
        if is_native:
            check_gain(plan.layout, self.lib, checkpoint.manifest.name)
        _say_what_is_lost(plan, losses, self.output)
        return self._write(plan, path, f"packing to {mix.name}")

    def repack(self, checkpoint: Checkpoint) -> dict[str, object]:
        """Beside the model's file. One that another libggml or CPU made, or of another version, is replaced."""
        from pipo.base.errors import UsageError
        from pipo.packing.native import is_current, native_output, plan_native

        path = native_output(checkpoint)
        if not self.overwrite and is_current(checkpoint, self.lib):
            raise UsageError(f"{path} is there already, and right for this CPU", hint="--overwrite makes it anew")
        return self._write(plan_native(checkpoint, self.lib, self.limit_bytes, self.num_threads), path, "repacking")

    def _write(self, plan: PackPlan, path: Path, what: str) -> dict[str, object]:
        """What `--json` says of it; otherwise it is said here."""
        from pipo.cli.bars import byte_bar
        from pipo.cli.terminal import print_note
        from pipo.packing.pack import pack as write_pack

        with byte_bar(what, self.output) as advance:
            report = write_pack(plan, path, self.lib, on_progress=advance)
        _warn_of_excess(plan, report)
        if not self.json:
            print(report.path)
            if not self.output.quiet:
                print_note(_closing_line(plan, report))
        return pack_dict(plan, report)


def default_name(manifest: Manifest, type_name: str) -> str:
    """`SmolLM2.Q4_1.gguf` packed to Q8_0 is `SmolLM2.Q8_0.gguf`."""
    first = manifest.files[0]
    is_folder = first.suffix != ".gguf"  # in a cache of the hub it is named as a revision, the model as REPO/MODEL
    stem = manifest.name.rpartition("/")[2] if is_folder else _SHARD_SUFFIX.sub("", first.stem)
    return f"{_TYPE_SUFFIX.sub('', stem)}.{type_name}.gguf"


def pack_dict(plan: PackPlan, report: PackReport) -> dict[str, object]:
    return {
        "path": str(report.path),
        "source_bytes": plan.manifest.num_bytes,
        "bytes": report.num_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "bytes_by_type": plan.bytes_by_type,
        "fallbacks": [
            {"tensor": t.name, "row": t.row_elems, "wanted": t.wanted.name, "type": t.type.name} for t in plan.fallbacks
        ],
        "num_tensors": len(plan.layout.tensors),
        "requantised_tensors": len(plan.requantised),
        "copied_tensors": sum(t.is_copied for t in plan.layout.tensors),
        "resumed_tensors": report.resumed,
        "seconds": report.seconds,
        "bytes_per_s": report.read_bytes / max(report.seconds, 1e-9),
        "peak_bytes": report.peak_bytes,
        "limit_bytes": plan.limit_bytes,
        "memory": plan.memory.breakdown,
    }


def _say_what_is_lost(plan: PackPlan, of_text: Sequence[str], output: OutputFlags) -> None:
    from pipo.cli.terminal import print_note, print_warning

    if output.quiet:
        return
    for line in of_text:
        print_warning(line)
    if plan.requantised:
        types = " ".join(dict.fromkeys(t.source.type.name for t in plan.requantised))
        print_warning(
            f"{len(plan.requantised)} tensors are quantised already ({types}): they are decoded and lose "
            "quality twice; from the F16 or BF16 model the result would be better"
        )
    for line in _fallback_lines(plan):
        print_note(line)


def _fallback_lines(plan: PackPlan) -> Iterator[str]:
    """One for each pair of types: `12 tensors as Q8_0: rows of 576 are no multiple of 256, …`."""
    kinds: dict[tuple[str, str, int, int], list[str]] = {}
    for t in plan.fallbacks:
        kinds.setdefault((t.wanted.name, t.type.name, t.row_elems, t.wanted.block_elems), []).append(t.name)
    for (wanted, used, row, block), names in kinds.items():
        more = f", … {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        yield (
            f"{used} instead of {wanted}: rows of {row} are not a multiple of {block}: "
            f"{', '.join(names[:_MAX_NAMED])}{more}"
        )


def _warn_of_excess(plan: PackPlan, report: PackReport) -> None:
    from pipo.cli.terminal import print_warning

    if report.peak_bytes > plan.limit_bytes:
        peak, limit = format_size(report.peak_bytes), format_size(plan.limit_bytes)
        print_warning(f"the process had {peak} of anonymous memory, more than the limit of {limit}")


def _closing_line(plan: PackPlan, report: PackReport) -> str:
    parts = [
        f"{format_size(plan.manifest.num_bytes)} → {format_size(report.num_bytes)}",
        f"{plan.bits_per_weight:.2f} bits per weight",
        f"{report.seconds:.1f} s at {format_rate(report.read_bytes / max(report.seconds, 1e-9))}",
        f"peak {format_size(report.peak_bytes)}",
    ]
    if report.resumed:
        parts.append(f"went on at tensor {report.resumed + 1} of {len(plan.layout.tensors)}")
    return " · ".join(parts)
