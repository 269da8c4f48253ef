"""What goes into the file beside a model: its matrices that have repacked kernels here, repacked.

Types that are repacked at several GB/s a thread, Q4_0 and IQ4_NL, are not among them: a transfer repacks them as fast
as a drive delivers. A 7B of Q4_0 at 2 GiB is as fast with such a file as without, one of Q4_K reads prompts of 256
tokens in 8.6 s instead of 18 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipo.base.errors import OutputFailed, PipoError, UnsupportedModel
from pipo.base.tensor_type import TensorType
from pipo.compute.devices import cpu_features
from pipo.compute.ggml import Library
from pipo.compute.repack import FAST_TO_REPACK, RepackBuffer
from pipo.formats.checkpoint import Checkpoint
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.gguf_writer import count_entry, text_entry, texts_entry
from pipo.formats.native import (
    GENERAL_TYPE,
    KERNELS_KEY,
    MADE_BY_KEY,
    SOURCE_KEY,
    VERSION,
    VERSION_KEY,
    has_place,
    native_path,
    open_native,
    source_of,
)
from pipo.models.registry import stages_of
from pipo.packing.layout import ALIGNMENT, ALIGNMENT_KEY, PackLayout, in_pass_order, laid_out
from pipo.packing.memory import fit_memory, process_bytes_now
from pipo.packing.plan import PackPlan, identity_of
from pipo.packing.types import TensorPlan


def plan_native(checkpoint: Checkpoint, lib: Library, limit_bytes: int, num_workers: int) -> PackPlan:
    """Raises UnsupportedModel where no matrix has a repacked kernel on this CPU; OverBudget as `plan_pack`."""
    layout = _layout(checkpoint, lib)
    memory = fit_memory(layout.tensors, layout.data_start, limit_bytes, num_workers, process_bytes_now())
    return PackPlan(checkpoint.manifest, layout, memory, limit_bytes, identity_of(checkpoint.manifest, layout, lib))


def native_output(checkpoint: Checkpoint) -> Path:
    """Raises OutputFailed where nothing of pipo's may lie beside the model, or the model is a folder."""
    path = native_path(checkpoint.manifest.files[0])
    if not has_place(checkpoint):
        is_file = isinstance(checkpoint.metadata, GgufMetadata)
        why = "belongs to the cache of the hub, which other programs share" if is_file else "has no repacked kernels"
        raise OutputFailed(f"{path.parent} {why}", hint="name a type and a file of your own: --type q4_k_m -o FILE")
    return path


def is_current(checkpoint: Checkpoint, lib: Library) -> bool:
    """The file is there and was made of this model, for the kernels that this libggml has here."""
    try:
        file = open_native(checkpoint.manifest)
    except PipoError:
        return False
    if file is None or file.source != source_of(checkpoint):
        return False
    with _kernels(lib) as repack:
        return repack is not None and file.is_for(repack.sample_digest)


def made_by(lib: Library) -> str:
    """For people: `libggml 0.15.3 with AVX2 AVX512`."""
    return f"libggml {lib.version_text} with {' '.join(cpu_features(lib))}"


def check_gain(layout: PackLayout, lib: Library, name: str) -> None:
    """Raises UnsupportedModel where a file of this layout would have nothing beside it."""
    with _kernels(lib) as repack:
        if not any(_gains(tensor.type, tensor.source.shape, repack) for tensor in layout.tensors):
            raise _nothing_to_gain(name)


def _layout(checkpoint: Checkpoint, lib: Library) -> PackLayout:
    with _kernels(lib) as repack:
        tensors = _tensors(checkpoint, repack)
        if repack is None or not tensors:
            raise _nothing_to_gain(checkpoint.manifest.name)
        types = sorted({tensor.type for tensor in tensors})
        digests = [f"{type_.name} {repack.sample_digest(type_)}" for type_ in types]
    entries = [
        text_entry("general.architecture", "none"),
        text_entry("general.type", GENERAL_TYPE),
        text_entry("general.name", checkpoint.manifest.name),
        count_entry(ALIGNMENT_KEY, ALIGNMENT),
        count_entry(VERSION_KEY, VERSION),
        text_entry(SOURCE_KEY, source_of(checkpoint)),
        text_entry(MADE_BY_KEY, made_by(lib)),
        texts_entry(KERNELS_KEY, digests),
    ]
    return laid_out(tensors, entries)


def _tensors(checkpoint: Checkpoint, repack: RepackBuffer | None) -> list[TensorPlan]:
    """In the order of a pass."""
    stages = stages_of(checkpoint.manifest)
    moving = {spec.name for stage in stages for spec in stage.specs}
    return [
        TensorPlan(spec, spec.type, spec.type, is_repacked=True)
        for spec in in_pass_order(checkpoint.manifest, stages)
        if spec.name in moving and _gains(spec.type, spec.shape, repack)
    ]


def _gains(type_: TensorType, shape: tuple[int, ...], repack: RepackBuffer | None) -> bool:
    """A product with such a weight is faster repacked, and repacking it is not as fast as reading it."""
    return repack is not None and type_ not in FAST_TO_REPACK and repack.supports(type_, shape[:2])


def _nothing_to_gain(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: there is nothing to gain: on this CPU libggml has no repacked kernels for its types, or they are "
        "repacked as fast as they are read",
        hint="`pipo doctor` lists those that have some; --type q4_k_m makes a file of such a type",
    )


@contextmanager
def _kernels(lib: Library) -> Iterator[RepackBuffer | None]:
    repack = RepackBuffer.find(lib)
    try:
        yield repack
    finally:
        if repack is not None:
            repack.close()
