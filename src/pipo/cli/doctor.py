"""`pipo doctor`: what this machine gives pipo, and what would give more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipo.base.cores import available_cores
from pipo.base.errors import LibraryError, TransferError, UsageError
from pipo.base.units import format_rate, format_size
from pipo.cli.flags import FreshFlag, JsonFlag, ModelArgument, OutputFlags, ProbeFlag

if TYPE_CHECKING:
    from pipo.cli.terminal import Row
    from pipo.compute.devices import Device
    from pipo.compute.ggml import Library, Provider
    from pipo.hardware.cache import KnownProfile
    from pipo.hardware.drive import DriveRate

_PROBE_SHAPE = (4096, 4096)  # rows and columns that every type's blocks divide


@dataclass(frozen=True, slots=True)
class Hint:
    """What would be better, and the command that makes it so."""

    what: str
    command: str


# The rates are those of docs/log.md: a 4096x4096 product of 64 tokens on two AVX-512 cores.
_LLAMAFILE_HINT = Hint(
    "this libggml lacks the LLAMAFILE kernels, which read prompts of F16, Q8_0 and K-quants 1.5 to 3 times as fast",
    "CMAKE_ARGS=-DGGML_LLAMAFILE=ON pip install --force-reinstall --no-deps --no-binary :all: ggml-python==0.0.45",
)
_NATIVE_HINT = Hint(
    "a newer libggml reads prompts of K-quants up to 6 times as fast; it compiles for ten minutes",
    "pip install 'pipo[native]'",
)


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """What the libggml in use can do here."""

    version: str
    provider: str
    folder: str
    features: tuple[str, ...]
    repacked_types: tuple[str, ...]
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    total_bytes: int
    available_bytes: int
    limited_by: str
    auto_bytes: int


@dataclass(frozen=True, slots=True)
class DriveFacts:
    """How the drive under `file` delivered."""

    file: str
    rates: tuple[DriveRate, ...]
    best: DriveRate


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything doctor looked at. None: it could not; `problems` says why."""

    library: LibraryFacts | None
    other_providers: tuple[Provider, ...]
    cores: int
    machine_cores: int
    memory: MemoryFacts
    drive: DriveFacts | None
    problems: tuple[str, ...]
    hints: tuple[Hint, ...]


def doctor(
    model: ModelArgument = None,
    probe: ProbeFlag = False,
    fresh: FreshFlag = False,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
) -> None:
    """Show what this machine gives pipo, and what would give more.

    The drive is measured where MODEL lies, or a model in pipo's folder or in this one. --probe also measures copies,
    repacking and compute, for the types of MODEL or the common ones; it takes some 15 seconds, once.
    """
    if fresh and not probe:
        raise UsageError("--fresh measures again what --probe has measured", hint="pipo doctor --probe --fresh")
    from pipo.cli.session import starting

    with starting(output):
        found = examine(model, measures_drive=not probe)
    if found.library is None:
        _show(found, None, json)
        raise LibraryError("pipo cannot compute without libggml", hint="pip install ggml-python")
    _show(found, _probe(model, fresh, output) if probe else None, json)


def _probe(model: str | None, fresh: bool, output: OutputFlags) -> KnownProfile:
    from pipo.cli.probe import probe_with_bar

    file = _file_to_read(model)
    if file is None:
        raise UsageError("there is no model to read the drive with", hint="`pipo pull smollm2`, or name a file")
    return probe_with_bar(file, is_model_named=model is not None, fresh=fresh, output=output)


def _show(found: Findings, known: KnownProfile | None, json: bool) -> None:
    from pipo.cli.probe import print_profile, profile_dict
    from pipo.cli.terminal import write_json

    if json:
        write_json(_findings_dict(found) | ({} if known is None else {"profile": profile_dict(known)}))
        return
    _print_findings(found)
    if known is not None:
        print_profile(known)


def examine(model: str | None, *, measures_drive: bool = True) -> Findings:
    """Raises what opening a model that was named raises."""
    problems: list[str] = []
    library, others = _examine_library(problems)
    drive = _examine_drive(_file_to_read(model), problems) if measures_drive else None
    return Findings(
        library,
        others,
        available_cores(),
        os.cpu_count() or 1,
        _examine_memory(),
        drive,
        tuple(problems),
        tuple(_hints(library)),
    )


def _examine_library(problems: list[str]) -> tuple[LibraryFacts | None, tuple[Provider, ...]]:
    from pipo.compute.ggml import find_providers, load

    try:
        lib, others = load(), tuple(find_providers()[1:])
    except LibraryError as error:
        problems.append(str(error))
        return None, ()
    return _library_facts(lib), others


def _library_facts(lib: Library) -> LibraryFacts:
    from pipo.compute.devices import cpu_features, list_devices

    return LibraryFacts(
        lib.version_text,
        lib.provider.name,
        str(lib.provider.folder),
        tuple(cpu_features(lib)),
        repacked_types(lib),
        tuple(list_devices(lib)),
    )


def device_lines() -> list[str]:
    """What `--device` can name, one a line. Raises LibraryError."""
    from pipo.compute.devices import DeviceKind, list_devices
    from pipo.compute.ggml import load

    lines = []
    for device in list_devices(load()):
        name = "cpu" if device.kind is DeviceKind.CPU else device.name
        sizes = f"{format_size(device.free_bytes)} free of {format_size(device.total_bytes)}"
        lines.append(f"{name}: {device.description}, {sizes}")
    return lines


def repacked_types(lib: Library) -> tuple[str, ...]:
    """The types with repacked kernels on this CPU."""
    from pipo.base.tensor_type import TensorType
    from pipo.compute.repack import RepackBuffer

    repack = RepackBuffer.find(lib)
    if repack is None:
        return ()
    try:
        return tuple(t.name for t in TensorType if lib.computes(t) and repack.supports(t, _PROBE_SHAPE))
    finally:
        repack.close()


def _examine_memory() -> MemoryFacts:
    from pipo.hardware.memory import auto_budget_bytes, available_memory, total_memory_bytes

    available = available_memory()
    return MemoryFacts(total_memory_bytes(), available.limit_bytes, available.source, auto_budget_bytes())


def _file_to_read(model: str | None) -> Path | None:
    from pipo.formats.checkpoint import open_weight_files
    from pipo.store.library import list_hub_models, list_models, resolve_model

    if model is not None:
        paths = [*open_weight_files(resolve_model(model)).files]  # what is no model is no measure of the drive either
        return max(paths, key=lambda path: path.stat().st_size)
    pulled = [m.path for m in list_hub_models() if m.path.is_file()]
    paths = [*(m.path for m in list_models()), *pulled] or sorted(Path.cwd().glob("*.gguf"))
    return max(paths, key=lambda path: path.stat().st_size, default=None)


def _examine_drive(file: Path | None, problems: list[str]) -> DriveFacts | None:
    from pipo.hardware.cache import drive_rates
    from pipo.hardware.drive import best_rate

    if file is None:
        problems.append("the drive was not measured: there is no model to read; `pipo pull smollm2`, or name a file")
        return None
    try:
        rates = drive_rates([file])
    except TransferError as error:
        problems.append(f"the drive was not measured: {error.message}")
        return None
    return DriveFacts(str(file), rates, best_rate(rates))


def _hints(library: LibraryFacts | None) -> Iterator[Hint]:
    """What a better libggml would give."""
    if library is None or library.provider != "ggml-python":
        return
    if "LLAMAFILE" not in library.features:
        yield _LLAMAFILE_HINT
    yield _NATIVE_HINT


def _print_findings(found: Findings) -> None:
    from pipo.cli.terminal import print_rows, stdout

    for title, section in _sections(found):
        print_rows(stdout(), title, section)
    rows = [("problem", problem) for problem in found.problems]
    for hint in found.hints:
        rows += [("better", hint.what), ("", hint.command)]
    if rows:
        print_rows(stdout(), "advice", rows)


def _sections(found: Findings) -> Iterator[tuple[str, Iterator[Row]]]:
    if found.library is not None:
        yield "library", _library_rows(found.library, found.other_providers)
    yield "machine", _machine_rows(found)
    if found.drive is not None:
        yield "drive", _drive_rows(found.drive)


def _library_rows(library: LibraryFacts, others: tuple[Provider, ...]) -> Iterator[Row]:
    yield "libggml", f"{library.version} from {library.provider}, {library.folder}"
    for other in others:
        yield "also here", f"{other.name}, {other.folder}"
    yield "features", " ".join(library.features)
    yield "repacked", " ".join(library.repacked_types) or "no kernels for this CPU"
    for device in library.devices:
        yield "device", f"{device.name}: {device.description}, {format_size(device.total_bytes)}"


def _machine_rows(found: Findings) -> Iterator[Row]:
    of = f" of {found.machine_cores}" if found.cores != found.machine_cores else ""
    yield "cores", f"{found.cores}{of}, one compute thread on each"
    memory = found.memory
    yield "memory", f"{format_size(memory.available_bytes)} available of {format_size(memory.total_bytes)}"
    yield "limited by", memory.limited_by
    yield "--ram auto", format_size(memory.auto_bytes)


def _drive_rows(drive: DriveFacts) -> Iterator[Row]:
    yield "read", f"{drive.file}, now or when this drive was first met"
    for rate in drive.rates:
        mark = ": the one pipo takes" if rate == drive.best else ""
        way = f"{rate.num_workers} reads of {format_size(rate.chunk_bytes)} at a time"
        yield "rate", f"{format_rate(rate.bytes_per_s)} with {way}{mark}"
    is_direct = all(rate.direct for rate in drive.rates)
    yield "O_DIRECT", "works" if is_direct else "refused: reads go through the page cache, which is emptied behind them"


def _findings_dict(found: Findings) -> dict[str, object]:
    library, drive = found.library, found.drive
    return {
        "library": None
        if library is None
        else asdict(library) | {"devices": [_device_dict(d) for d in library.devices]},
        "other_providers": [{"name": p.name, "folder": str(p.folder)} for p in found.other_providers],
        "cores": found.cores,
        "machine_cores": found.machine_cores,
        "memory": asdict(found.memory),
        "drive": None if drive is None else asdict(drive),
        "problems": list(found.problems),
        "hints": [asdict(hint) for hint in found.hints],
    }


def _device_dict(device: Device) -> dict[str, object]:
    return asdict(device) | {"kind": device.kind.name.lower()}
