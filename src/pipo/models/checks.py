"""What a family checks before it trusts a file: every tensor known and of the right shape, no key it ignores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import Manifest, TensorSpec
from pipo.base.tensor_type import TensorType


@dataclass(frozen=True, slots=True)
class Linears:
    """Matrices (in, out) by role, and the biases of those that have one."""

    matrices: dict[str, TensorSpec]
    biases: dict[str, TensorSpec]


class TensorBook:
    """Hands out a manifest's tensors with their shapes checked, and remembers which were asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._manifest.tensors

    def matrix(self, name: str, num_in: int, num_out: int) -> TensorSpec:
        return self._tensor(name, (num_in, num_out))

    def optional_matrix(self, name: str, num_in: int, num_out: int) -> TensorSpec | None:
        return self.matrix(name, num_in, num_out) if self.has(name) else None

    def vector(self, name: str, size: int) -> TensorSpec:
        return self._in_full(self._tensor(name, (size,)))

    def _in_full(self, spec: TensorSpec) -> TensorSpec:
        if spec.type is not TensorType.F32:
            raise UnsupportedModel(f"{self._manifest.name}: {spec.name} is {spec.type.name}; vectors must be F32")
        return spec

    def table(self, name: str, size: int, num_rows: int) -> TensorSpec:
        """A matrix of which single rows are looked up: F32, as vectors are, and as resident."""
        return self._in_full(self._tensor(name, (size, num_rows)))

    def experts(self, name: str, num_in: int, num_out: int, num_experts: int) -> TensorSpec:
        """The matrices of all routed experts of a block, as one tensor (in, out, experts)."""
        first = name.replace("_exps", ".0")
        if not self.has(name) and self.has(first):
            raise UnsupportedModel(
                f"{self._manifest.name}: has a tensor for each expert ({first}), as llama.cpp wrote them before 2024",
                hint="convert the model again: one tensor holds all experts of a block",
            )
        return self._tensor(name, (num_in, num_out, num_experts))

    def linears(self, block_idx: int, **shapes: tuple[int, int]) -> Linears:
        matrices, biases = {}, {}
        for role, (num_in, num_out) in shapes.items():
            name = f"blk.{block_idx}.{role}"
            matrices[f"{role}.weight"] = self.matrix(f"{name}.weight", num_in, num_out)
            if self.has(f"{name}.bias"):
                biases[f"{role}.bias"] = self.vector(f"{name}.bias", num_out)
        return Linears(matrices, biases)

    def refuse_dense(self) -> None:
        """Raises MalformedFile where the file names no experts: the family is one of mixtures."""
        hyper = self._manifest.hyper
        if not hyper.num_experts:
            key = f"{hyper.architecture}.expert_count"
            raise MalformedFile(f"{self._manifest.name}: key {key!r} is missing or 0, wanted the experts of a block")

    def refuse_leftovers(self) -> None:
        """Raises UnsupportedModel when the file holds tensors nobody asked for: it needs more than we would run."""
        leftovers = sorted(self._manifest.tensors.keys() - self._used)
        if leftovers:
            more = f" and {len(leftovers) - 3} more" if len(leftovers) > 3 else ""
            raise UnsupportedModel(
                f"{self._manifest.name}: architecture {self._manifest.hyper.architecture} has tensors pipo does not "
                f"run: {', '.join(f'{name!r:.80}' for name in leftovers[:3])}{more}"
            )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        spec = self._manifest.tensors.get(name)
        if spec is None:
            raise MalformedFile(f"{self._manifest.name}: tensor {name} is missing; wanted shape {shape}")
        if spec.shape != shape:
            raise MalformedFile(f"{self._manifest.name}: tensor {name} has shape {spec.shape}, wanted {shape}")
        self._used.add(name)
        return spec


def refuse_unknown_keys(manifest: Manifest, harmless: Mapping[str, object]) -> None:
    """Raises UnsupportedModel for a key that the family neither reads nor knows to change nothing as it is."""
    for key, value in manifest.extra.items():
        if key in harmless and harmless[key] == value:
            continue
        name = f"{manifest.hyper.architecture}.{key}"
        raise UnsupportedModel(
            f"{manifest.name}: key {name!r:.80} = {value!r:.80} asks for something pipo does not run"
        )
