"""The account of every byte: who holds how much of the limit the user named."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from pipo.base.errors import OverBudget
from pipo.base.units import format_size


class Reservation:
    """Bytes taken from a ledger under a name. Close it, once, to give them back; a context manager."""

    __slots__ = ("_is_closed", "_ledger", "name", "num_bytes")

    def __init__(self, ledger: Ledger, name: str, num_bytes: int) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self._ledger = ledger
        self._is_closed = False

    def resize(self, num_bytes: int) -> None:
        """Take more, or give a part back. Raises OverBudget, in which case nothing has changed."""
        assert not self._is_closed
        self._ledger._resize(self, num_bytes)
        self.num_bytes = num_bytes

    def close(self) -> None:
        assert not self._is_closed, f"{self.name} was given back twice"
        self._is_closed = True
        self._ledger._give_back(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ledger:
    """Counts reserved bytes against a limit: `of` names the memory, `flag` what sets the limit. Allocates nothing.

    Threads: any.
    """

    def __init__(self, limit_bytes: int, *, of: str = "RAM", flag: str = "--ram") -> None:
        self.limit_bytes = limit_bytes
        self._of = of
        self._flag = flag
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._in_use_bytes = 0
        self._peak_bytes = 0

    def reserve(self, name: str, num_bytes: int) -> Reservation:
        """Take `num_bytes` under `name`; names may repeat and add up. Raises OverBudget with the whole breakdown."""
        assert num_bytes >= 0
        self._take(name, num_bytes)
        return Reservation(self, name, num_bytes)

    @property
    def in_use_bytes(self) -> int:
        return self._in_use_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was ever in use at once."""
        return self._peak_bytes

    def breakdown(self) -> dict[str, int]:
        """Bytes in use by name, largest first."""
        with self._lock:
            return dict(self._held.most_common())

    def _take(self, name: str, num_bytes: int) -> None:
        """A negative number is given back."""
        with self._lock:
            if num_bytes > 0 and self._in_use_bytes + num_bytes > self.limit_bytes:
                raise self._over_budget(name, num_bytes)
            self._held[name] += num_bytes
            self._in_use_bytes += num_bytes
            self._peak_bytes = max(self._peak_bytes, self._in_use_bytes)
            assert self._held[name] >= 0
            if not self._held[name]:
                del self._held[name]

    def _resize(self, reservation: Reservation, num_bytes: int) -> None:
        self._take(reservation.name, num_bytes - reservation.num_bytes)

    def _give_back(self, reservation: Reservation) -> None:
        self._take(reservation.name, -reservation.num_bytes)

    def _over_budget(self, name: str, num_bytes: int) -> OverBudget:
        wanted = self._held + Counter({name: num_bytes})
        line = " · ".join(f"{part} {format_size(size)}" for part, size in wanted.most_common())
        needed = self._in_use_bytes + num_bytes
        return OverBudget(
            f"needs {format_size(needed)} of {self._of}, the limit is {format_size(self.limit_bytes)}\n  {line}",
            hint=f"{name} does not fit; {self._flag} must be at least {format_size(needed)}",
        )
