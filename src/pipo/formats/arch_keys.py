"""The keys under `{architecture}.` of a GGUF file: taken one by one, each checked."""

from __future__ import annotations

from math import isfinite

import numpy as np

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.formats.gguf_metadata import ArrayRef, GgufMetadata, ValueType, describe_value

MAX_SIZE = (1 << 31) - 1
MAX_EXTRA_BYTES = 1 << 20  # of all arrays without a field together; real ones have an entry per layer or rope section


class ArchKeys:
    """Keeps account of those that nobody took."""

    def __init__(self, metadata: GgufMetadata, architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self._taken: set[str] = set()
        self._extra_bytes = 0

    def full(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def size(self, name: str, *, most: int = MAX_SIZE, per_layer: int = 0) -> int:
        """A required count from 1 to `most`. An array of `per_layer` equal values will do."""
        value = self.size_or_none(name, most=most, per_layer=per_layer)
        if value is None:
            raise self.wrong(name, "missing", f"a count from 1 to {most}")
        return value

    def size_or_none(self, name: str, *, most: int = MAX_SIZE, per_layer: int = 0) -> int | None:
        self._taken.add(name)
        found = self.metadata.get(self.full(name))
        if per_layer and isinstance(found, ArrayRef):
            value: int | None = self._same_in_all_layers(name, found, per_layer)
        else:
            value = self.metadata.integer(self.full(name))
        if value is not None and not 1 <= value <= most:
            raise self.wrong(name, str(value), f"a count from 1 to {most}")
        return value

    def count(self, name: str, *, most: int = MAX_SIZE) -> int:
        """From 0 to `most`; 0 where there is none."""
        self._taken.add(name)
        value = self.metadata.integer(self.full(name))
        if value is not None and not 0 <= value <= most:
            raise self.wrong(name, str(value), f"a count from 0 to {most}")
        return value or 0

    def number_or_none(self, name: str, least: float, most: float) -> float | None:
        self._taken.add(name)
        value = self.metadata.number(self.full(name))
        if value is not None and not (isfinite(value) and least <= value <= most):
            raise self.wrong(name, str(value), f"a number from {least:g} to {most:g}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.number_or_none(name, least, most)
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        self._taken.add(name)
        value = self.metadata.text(self.full(name))
        return default if value is None else value

    def take(self, name: str) -> object:
        """As the file has it; None where it has none."""
        self._taken.add(name)
        return self.metadata.get(self.full(name))

    def ignore(self, name: str) -> None:
        """Take a key that changes nothing."""
        self._taken.add(name)

    def left_over(self) -> dict[str, object]:
        """What nobody took, without the prefix; arrays as tuples."""
        prefix = self.full("")
        names = [key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)]
        return {name: self._plain(name) for name in names if name not in self._taken}

    def wrong(self, name: str, found: str, wanted: str) -> MalformedFile:
        return MalformedFile(f"{self.metadata.path}: key {self.full(name)!r} is {found}, wanted {wanted}")

    def _same_in_all_layers(self, name: str, ref: ArrayRef, per_layer: int) -> int:
        if ref.count != per_layer or ref.element_type in (ValueType.STRING, ValueType.FLOAT32, ValueType.FLOAT64):
            raise self.wrong(name, describe_value(ref), f"an integer, or one for each of {per_layer} layers")
        values = np.unique(self.metadata.array(self.full(name)))
        if len(values) > 1:
            raise UnsupportedModel(
                f"{self.metadata.path}: key {self.full(name)!r} differs between layers ({values.min()} to "
                f"{values.max()}), which pipo does not implement"
            )
        return int(values[0])

    def _plain(self, name: str) -> object:
        key = self.full(name)
        value = self.metadata.get(key)
        if not isinstance(value, ArrayRef):
            return value
        self._extra_bytes += value.num_bytes
        if self._extra_bytes > MAX_EXTRA_BYTES:
            raise UnsupportedModel(
                f"{self.metadata.path}: key {key!r:.80} is {describe_value(value)}, which brings arrays that pipo "
                f"does not know to {self._extra_bytes} bytes, at most {MAX_EXTRA_BYTES} can be"
            )
        if value.element_type is ValueType.STRING:
            return tuple(self.metadata.strings(key))
        return tuple(self.metadata.array(key).tolist())
