"""tiers.ledger: the account adds up, and refuses with the whole account in the message."""

from __future__ import annotations

import threading

import pytest

from pipo.base.errors import OverBudget
from pipo.base.units import GIB, MIB
from pipo.tiers.ledger import Ledger


def test_reservations_add_up_by_name_and_come_back() -> None:
    ledger = Ledger(100)
    weights, more, cache = ledger.reserve("weights", 30), ledger.reserve("weights", 20), ledger.reserve("KV cache", 40)
    assert ledger.in_use_bytes == 90 and ledger.breakdown() == {"weights": 50, "KV cache": 40}
    more.close()
    assert ledger.breakdown() == {"KV cache": 40, "weights": 30}
    weights.close()
    cache.close()
    assert ledger.in_use_bytes == 0 and ledger.breakdown() == {} and ledger.peak_bytes == 90


def test_the_limit_itself_fits_and_one_byte_more_does_not() -> None:
    ledger = Ledger(100)
    with ledger.reserve("weights", 100), pytest.raises(OverBudget):
        ledger.reserve("slots", 1)
    assert ledger.in_use_bytes == 0


def test_refusal_names_every_part_and_changes_nothing() -> None:
    ledger = Ledger(4 * GIB)
    with ledger.reserve("weights", 3 * GIB), ledger.reserve("process", 200 * MIB):
        with pytest.raises(OverBudget) as refused:
            ledger.reserve("KV cache", 2 * GIB)
        assert ledger.breakdown() == {"weights": 3 * GIB, "process": 200 * MIB}
    assert str(refused.value) == (
        "needs 5.2 GiB of RAM, the limit is 4.0 GiB\n"
        "  weights 3.0 GiB · KV cache 2.0 GiB · process 200.0 MiB\n\n"
        "hint: KV cache does not fit; --ram must be at least 5.2 GiB"
    )


def test_giving_back_twice_is_our_bug() -> None:
    reservation = Ledger(10).reserve("slots", 5)
    reservation.close()
    with pytest.raises(AssertionError, match="slots"):
        reservation.close()


def test_many_threads_leave_nothing_behind() -> None:
    ledger = Ledger(1000)
    refused = []

    def churn() -> None:
        for _ in range(500):
            try:
                with ledger.reserve("slots", 300):
                    assert ledger.in_use_bytes <= 1000
            except OverBudget as error:
                refused.append(error)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.in_use_bytes == 0 and ledger.peak_bytes <= 1000


def test_a_reservation_grows_and_shrinks_within_the_limit() -> None:
    ledger = Ledger(100)
    with ledger.reserve("KV cache", 0) as cache, ledger.reserve("weights", 60) as weights:
        cache.resize(40)
        with pytest.raises(OverBudget, match="KV cache"):
            cache.resize(41)
        assert ledger.breakdown() == {"weights": 60, "KV cache": 40}
        weights.resize(20)
        cache.resize(80)
        assert ledger.in_use_bytes == 100
    assert ledger.in_use_bytes == 0 and ledger.peak_bytes == 100
