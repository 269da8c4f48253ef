"""tiers.ledger against the plainest account there is: a list of open reservations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipo.base.errors import OverBudget
from pipo.tiers.ledger import Ledger, Reservation

LIMIT = 1000


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(LIMIT)
        self.open: list[Reservation] = []
        self.peak = 0

    @rule(name=st.sampled_from(["weights", "slots", "KV cache"]), num_bytes=st.integers(0, 600))
    def reserve(self, name: str, num_bytes: int) -> None:
        if self.total() + num_bytes > LIMIT:
            with pytest.raises(OverBudget):
                self.ledger.reserve(name, num_bytes)
        else:
            self.open.append(self.ledger.reserve(name, num_bytes))
            self.peak = max(self.peak, self.total())

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.open:
            self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).close()

    @invariant()
    def accounts_agree(self) -> None:
        assert self.ledger.in_use_bytes == self.total() == sum(self.ledger.breakdown().values())
        assert self.ledger.peak_bytes == self.peak <= LIMIT

    def total(self) -> int:
        return sum(reservation.num_bytes for reservation in self.open)

    def teardown(self) -> None:
        for reservation in self.open:
            reservation.close()
        assert self.ledger.in_use_bytes == 0 and self.ledger.breakdown() == {}


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
