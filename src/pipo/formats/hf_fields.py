"""The fields of a config.json: taken one by one, checked, with an account of those that nobody took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipo.base.errors import MalformedFile, UnsupportedModel

MAX_SIZE = (1 << 31) - 1


class HfFields:
    """The fields of one table of the file. A field that is null is one that is not there. `at` is the table's name."""

    def __init__(self, path: Path, fields: Mapping[str, object], at: str = "") -> None:
        self.path = path
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._off = fields.keys() - self._fields.keys()
        self._at = at
        self._taken: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def get(self, name: str) -> object | None:
        self._taken.add(name)
        return self._fields.get(name)

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """A count from `least` to `most`, required where there is no default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a count from {least} to {most}")
        return value

    def size_or_off(self, name: str, default: int) -> int:
        """As `size`, but 0 where the field is null."""
        return 0 if name in self._off else self.size(name, default, least=0)

    def number_or_off(self, name: str, default: float, *, most: float) -> float:
        """As `number`, but 0 where the field is null."""
        return 0.0 if name in self._off else self.number(name, default, least=0.0, most=most)

    def number(self, name: str, default: float | None = None, *, least: float, most: float) -> float:
        value = self.number_or_none(name, least=least, most=most)
        if value is not None:
            return value
        if default is None:
            raise self.wrong(name, None, f"a number from {least:g} to {most:g}")
        return default

    def number_or_none(self, name: str, *, least: float, most: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        return value

    def numbers(self, name: str, count: int, *, least: float, most: float) -> tuple[float, ...]:
        """A required list of `count` numbers."""
        value = self.get(name)
        is_list = isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)
        if isinstance(value, list) and is_list and all(least <= v <= most for v in value):
            return tuple(float(v) for v in value)
        raise self.wrong(name, value, f"{count} numbers from {least:g} to {most:g}")

    def texts(self, name: str, count: int, known: Sequence[str]) -> tuple[str, ...] | None:
        """A list of `count` words that are known; None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == count and all(v in known for v in value):
            return tuple(value)
        raise self.wrong(name, value, f"{count} of {', '.join(known)}")

    def table(self, name: str) -> HfFields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "a table")
        return HfFields(self.path, value, f"{self._at}{name}.")

    def expect(self, name: str, wanted: object) -> None:
        """A field that pipo implements with one value only, which is its default."""
        value = self.get(name)
        if value is not None and (type(value) is not type(wanted) or value != wanted):
            raise UnsupportedModel(
                f"{self.path}: field {self._at + name!r} is {value!r:.80}, pipo implements {wanted!r} only"
            )

    def ignore(self, *names: str) -> None:
        """Take fields that change nothing."""
        self._taken.update(names)

    def refuse_left_over(self) -> None:
        """Raises UnsupportedModel for a field nobody took: it may ask for something that pipo does not run."""
        for name, value in self._fields.items():
            if name not in self._taken:
                raise UnsupportedModel(
                    f"{self.path}: field {self._at + name!r:.80} = {value!r:.80} asks for something pipo does not know"
                )

    def wrong(self, name: str, found: object, wanted: str) -> MalformedFile:
        what = "is missing" if found is None else f"is {found!r:.80}"
        return MalformedFile(f"{self.path}: field {self._at + name!r} {what}, wanted {wanted}")
