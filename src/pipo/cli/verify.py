"""`pipo verify`: whether a model file is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipo.base.units import format_rate, format_size
from pipo.cli.flags import JsonFlag, ModelArgument, ModelFlag, OutputFlags
from pipo.cli.prompt import only_model

if TYPE_CHECKING:
    from pathlib import Path

    from pipo.packing.verify import Damage, Verdict

MAX_THREADS = 8  # which hash faster than a drive delivers


def verify(
    model: ModelArgument = None, model_flag: ModelFlag = None, json: JsonFlag = False, *, output: OutputFlags
) -> None:
    """Read a whole model file and compare it with the checksums that `pipo pack` wrote into it.

    Its weights in another layout, FILE.native, too. Of a file without checksums: its header, its bounds, and that every
    weight is a finite number; ends with 3 then.
    """
    name = only_model(model, model_flag)

    from pipo.base.cores import available_cores
    from pipo.base.errors import DamagedFile, NoChecksums, UnsupportedModel
    from pipo.cli.bars import byte_bar
    from pipo.cli.terminal import write_json
    from pipo.compute import ggml
    from pipo.formats.hf_folder import folder_of
    from pipo.formats.native import native_path
    from pipo.packing.verify import verify as look
    from pipo.store.library import resolve_model

    threads = min(available_cores(), MAX_THREADS)
    path = resolve_model(name)
    if folder_of(path) is not None:
        raise UnsupportedModel(
            f"{path}: is a Hugging Face folder; checksums are what `pipo pack` writes into a GGUF file",
            hint="`pipo pull` compares what it fetches with the hub's hashes",
        )

    def verdict_on(file: Path) -> Verdict:
        with byte_bar("verifying", output) as advance:
            return look(file, ggml.load(), num_threads=threads, on_progress=advance)

    verdict = verdict_on(path)
    beside = native_path(verdict.files[0])
    native = verdict_on(beside) if beside.is_file() else None
    verdicts = [verdict] if native is None else [verdict, native]
    if json:
        write_json(verdict_dict(verdict) | {"native": verdict_dict(native) if native else None})
    for each in verdicts:
        if each.damage is not None:
            raise DamagedFile(damage_text(each.damage), hint="fetch or pack the file again")
    for each in verdicts:
        if not each.has_checksums:
            raise NoChecksums(
                f"{each.files[0]} has no checksums to compare with: its header is sound, every tensor lies within the "
                f"file and every weight is a finite number ({_cost_text(each)})",
                hint="`pipo pack` writes files with checksums",
            )
    for each in () if json else verdicts:
        print(f"intact: {_cost_text(each)}, all checksums as written")


def status_of(verdict: Verdict) -> str:
    if verdict.damage is not None:
        return "damaged"
    return "intact" if verdict.has_checksums else "unchecked"


def verdict_dict(verdict: Verdict) -> dict[str, object]:
    damage = verdict.damage
    return {
        "files": [str(file) for file in verdict.files],
        "status": status_of(verdict),
        "has_checksums": verdict.has_checksums,
        "num_tensors": verdict.num_tensors,
        "bytes": verdict.num_bytes,
        "seconds": verdict.seconds,
        "bytes_per_s": verdict.num_bytes / max(verdict.seconds, 1e-9),
        "damage": damage
        and {
            "tensor": damage.tensor,
            "file": str(damage.file),
            "offset": damage.offset,
            "bytes": damage.num_bytes,
            "wanted": damage.wanted,
            "found": damage.found,
        },
    }


def damage_text(damage: Damage) -> str:
    return (
        f"{damage.file}: {damage.tensor}, {damage.num_bytes} bytes at offset {damage.offset}, is damaged\n"
        f"  wanted {damage.wanted}\n  found  {damage.found}"
    )


def _cost_text(verdict: Verdict) -> str:
    rate = format_rate(verdict.num_bytes / max(verdict.seconds, 1e-9))
    return f"{verdict.num_tensors} tensors, {format_size(verdict.num_bytes)} in {verdict.seconds:.1f} s at {rate}"
