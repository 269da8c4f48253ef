"""The tensors of a Hugging Face folder → TensorSpecs under llama.cpp's names. Nothing is copied or transposed.

Matrices stay as the file has them. Vectors, routers and tables of positions become F32 on their way to memory, which
is what ggml adds and multiplies with. The experts of a block, a tensor each, become one whose matrices lie apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import Conversion, Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.formats.hf_folder import HfWeights, some_of
from pipo.formats.hf_model import HfModel
from pipo.formats.hf_names import ExpertName, FusedExperts
from pipo.formats.safetensors import StoredTensor

_FLOATS = (TensorType.BF16, TensorType.F16, TensorType.F32)
_HEAD, _POSITIONS = "output.weight", "position_embd.weight"
_ROUTER, _GATE = ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight"
_QUANTISED = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")


class HfTensors:
    """Collects the specs of one model. Raises MalformedFile and UnsupportedModel, naming tensors as the file does."""

    def __init__(self, folder: Path, weights: HfWeights, model: HfModel) -> None:
        self._folder = folder
        self._weights = weights
        self._model = model
        self._specs: dict[str, TensorSpec] = {}
        self._experts: dict[str, dict[int, TensorSpec]] = {}

    def read(self) -> dict[str, TensorSpec]:
        unknown = [name for name in self._weights.tensors if not self._take(name)]
        if unknown:
            raise self._unknown(sorted(unknown))
        for role, matrices in self._experts.items():
            self._add(self._stacked(role, matrices), role)
        self._check_head()
        self._check_biases()
        vectors = self._model.vectors.items()
        return self._specs | {name: _computed(name, values) for name, values in vectors}

    def _take(self, name: str) -> bool:
        """Whether the model has a use for the tensor."""
        names = self._model.names
        found = names.find(name)
        if found is None:
            return names.is_unused(name)
        file_idx, tensor = self._weights.tensors[name]
        if isinstance(found, ExpertName):
            matrix = _of_floats(self._path(file_idx), tensor.as_spec(self._path(file_idx), file_idx, found.role))
            experts = self._experts.setdefault(found.role, {})
            if found.expert_idx in experts:
                raise MalformedFile(f"{self._folder}: {name!r} is a second matrix for {found}")
            experts[found.expert_idx] = matrix
        elif isinstance(found, FusedExperts):
            for spec in self._fused(found, tensor, file_idx):
                self._add(spec, name)
        elif found != _HEAD or not self._model.is_tied:
            self._add(self._spec(found, tensor, file_idx), name)
        return True

    def _add(self, spec: TensorSpec, name: str) -> None:
        if spec.name in self._specs:
            raise MalformedFile(f"{self._folder}: {name!r} is a second tensor for {spec.name}")
        self._specs[spec.name] = spec

    def _spec(self, name: str, tensor: StoredTensor, file_idx: FileIdx) -> TensorSpec:
        path = self._path(file_idx)
        spec = _of_floats(path, tensor.as_spec(path, file_idx, name))
        if name == _POSITIONS:
            spec = self._without_skipped(spec)
        if name.endswith(_GATE) and spec.shape[1:] == (1,):
            spec = replace(spec, shape=spec.shape[:1])
        is_norm = name.endswith("norm.weight")
        added = self._model.names.norms_add if is_norm else 0.0
        is_vector = len(spec.shape) == 1 or name == _POSITIONS or name.endswith(_ROUTER)
        return _in_full(spec, added) if is_vector else spec

    def _without_skipped(self, spec: TensorSpec) -> TensorSpec:
        skipped = self._model.names.skipped_positions
        num_rows = spec.shape[-1] - skipped
        if len(spec.shape) != 2 or num_rows < 1:
            raise MalformedFile(f"{self._folder}: the table of positions has shape {spec.shape[::-1]}")
        start = skipped * spec.type.row_bytes(spec.shape[0])
        extent = Extent(spec.extent.file_idx, spec.extent.offset + start, spec.extent.num_bytes - start)
        return replace(spec, shape=(spec.shape[0], num_rows), extent=extent)

    def _fused(self, found: FusedExperts, tensor: StoredTensor, file_idx: FileIdx) -> list[TensorSpec]:
        """Gate and up, or down, of all experts: (experts, out, in) in the file."""
        hyper, path, roles = self._model.hyper, self._path(file_idx), found.roles
        inner = hyper.expert_size or hyper.intermediate_size
        num_out, num_in = (len(roles) * inner, hyper.hidden_size) if len(roles) == 2 else (hyper.hidden_size, inner)
        wanted = (hyper.num_experts, num_out, num_in)
        if tensor.shape == (hyper.num_experts, num_in, num_out) != wanted:
            raise UnsupportedModel(
                f"{path}: tensor {tensor.name!r} has shape {tensor.shape}, {wanted} transposed, which would need a copy"
            )
        if tensor.shape != wanted:
            raise MalformedFile(f"{path}: tensor {tensor.name!r} has shape {tensor.shape}, wanted {wanted}")
        whole = _of_floats(path, tensor.as_spec(path, file_idx, roles[0]))
        return [whole] if len(roles) == 1 else [_part(whole, role, i, inner) for i, role in enumerate(roles)]

    def _stacked(self, role: str, matrices: Mapping[int, TensorSpec]) -> TensorSpec:
        num_experts = self._model.hyper.num_experts
        if matrices.keys() != set(range(num_experts)):
            odd = sorted(matrices.keys() ^ set(range(num_experts)))
            raise MalformedFile(
                f"{self._folder}: {role} has {len(matrices)} experts, config.json says {num_experts}: look for expert "
                f"{odd[0]}"
            )
        first = matrices[0]
        for idx, each in matrices.items():
            if (each.shape, each.type) != (first.shape, first.type):
                raise MalformedFile(
                    f"{self._folder}: {role} is {first.type.name} {first.shape} of expert 0, {each.type.name} "
                    f"{each.shape} of expert {idx}"
                )
        slices = tuple(matrices[idx].extent for idx in range(num_experts))
        return replace(first, shape=(*first.shape, num_experts), slices=slices)

    def _check_head(self) -> None:
        """Families take the embedding table in its place, where it is missing."""
        if _HEAD not in self._specs and not self._model.is_tied:
            raise MalformedFile(
                f"{self._folder}: tensor 'lm_head.weight' is missing, and config.json does not say that the embedding "
                "table is the head too ('tie_word_embeddings')"
            )

    def _check_biases(self) -> None:
        """There are those that config.json says, no others: families would take what is there."""
        found = {name.removesuffix(".bias") for name in self._specs if name.endswith(".bias")}
        roles, num_layers = self._model.names.biases, self._model.hyper.num_layers
        tops = {role for role in roles if role == "output_norm"}
        wanted = {f"blk.{i}.{role}" for i in range(num_layers) for role in roles - tops} | tops
        odd = sorted(found ^ wanted)
        if odd:
            what = "has a bias, config.json says none" if odd[0] in found else "lacks the bias that it should have"
            raise MalformedFile(f"{self._folder}: {odd[0]} {what}")

    def _unknown(self, names: list[str]) -> UnsupportedModel:
        if any(name.endswith(_QUANTISED) for name in names):
            return UnsupportedModel(
                f"{self._folder}: has quantised weights ({some_of(names)})",
                hint="download the model in its original precision (BF16, F16, F32), or a GGUF of it",
            )
        return UnsupportedModel(
            f"{self._folder}: architecture {self._model.hyper.architecture} has tensors pipo does not run: "
            f"{some_of(names)}"
        )

    def _path(self, file_idx: FileIdx) -> Path:
        return self._weights.files[file_idx]


def _of_floats(path: Path, spec: TensorSpec) -> TensorSpec:
    if spec.type not in _FLOATS:
        raise UnsupportedModel(f"{path}: the tensor for {spec.name} is {spec.type.name}, wanted BF16, F16 or F32")
    return spec


def _in_full(spec: TensorSpec, added: float) -> TensorSpec:
    if spec.type is TensorType.F32 and not added:
        return spec
    return replace(spec, type=TensorType.F32, conversion=Conversion(spec.type, added))


def _part(whole: TensorSpec, role: str, idx: int, num_rows: int) -> TensorSpec:
    """Rows `idx * num_rows` and after of every matrix."""
    num_in, num_out, num_experts = whole.shape
    row_bytes = whole.type.row_bytes(num_in)
    starts = [whole.extent.offset + (e * num_out + idx * num_rows) * row_bytes for e in range(num_experts)]
    slices = tuple(Extent(whole.extent.file_idx, start, num_rows * row_bytes) for start in starts)
    return replace(whole, name=role, shape=(num_in, num_rows, num_experts), extent=slices[0], slices=slices)


def _computed(name: str, values: tuple[float, ...]) -> TensorSpec:
    return TensorSpec(name, TensorType.F32, (len(values),), Extent(FileIdx(0), 0, 0), values=values)
