"""Whether the file beside a model that has its matrices repacked can be used here, or why not."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipo.base.errors import ModelError, TransferError, UsageError
from pipo.base.manifest import Manifest, TensorSpec
from pipo.compute.repack import RepackBuffer
from pipo.formats.native import NativeFile, has_place, native_path, open_native, source_of
from pipo.model_file import ModelFile
from pipo.models.stage import Stage

log = logging.getLogger(__name__)

NATIVE = "native"  # of EngineConfig.layout: what the file has, or nothing


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model's weights are read from."""

    manifest: Manifest
    stages: Sequence[Stage]


class NativeWeights:
    """A model's weights, plain as its own files have them, or repacked as far as the file beside it has them."""

    def __init__(self, model: ModelFile, repack: RepackBuffer | None, wanted: str) -> None:
        """`wanted` is EngineConfig.layout. Raises UsageError where that demands a file that cannot be used."""
        self._plain = Weights(model.manifest, model.stages)
        found = None if wanted == "plain" else _usable(model, repack)
        if wanted == NATIVE and not isinstance(found, NativeFile):
            where = native_path(model.manifest.files[0])
            raise UsageError(
                f"--layout native: {found or f'there is no {where}'}",
                hint=f"`pipo pack {model.path} {'' if has_place(model.checkpoint) else '--type q4_k_m -o FILE '}"
                "--layout native` makes it",
            )
        if isinstance(found, str):
            log.warning("weights=%s repacked=not used reason=%r", model.manifest.name, found)
        self.file = found if isinstance(found, NativeFile) else None
        self.problem = found if isinstance(found, str) else None
        self._manifest = self.file.manifest_with(model.manifest) if self.file else model.manifest

    @property
    def plain(self) -> Weights:
        return self._plain

    def repacked(self, without: Collection[str] = ()) -> Weights:
        """With those from the file but for the tensors named, which something else than the CPU computes with."""
        file = self.file
        if file is None:
            return self._plain

        def other(spec: TensorSpec) -> TensorSpec:
            return spec if spec.name in without else file.tensors.get(spec.name, spec)

        return Weights(self._manifest, [stage.with_specs(other) for stage in self._plain.stages])


def _usable(model: ModelFile, repack: RepackBuffer | None) -> NativeFile | str | None:
    """Or why it is not. None where there is none."""
    try:
        file = open_native(model.manifest)
    except (ModelError, TransferError) as error:
        return error.message
    if file is None:
        return None
    if file.source != source_of(model.checkpoint):
        return f"{file.path} was made of another version of the model"
    if repack is None or not file.is_for(repack.sample_digest):
        return f"{file.path} was made by {file.made_by}, whose kernels want other bytes than those here"
    return file
