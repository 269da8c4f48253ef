"""Errors go from one process to another and stay what they were."""

from __future__ import annotations

import pickle

import pytest

from pipo.base import errors
from pipo.base.errors import MalformedProfile, OutOfDeviceMemory, OverBudget, PipoError, ReadFailed, UsageError

MADE: list[PipoError] = [
    UsageError("no", hint="yes"),
    OverBudget("too little", smallest_bytes=7, hint="more"),
    ReadFailed("EIO", path="m.gguf", offset=4096, wanted_bytes=10, got_bytes=3, hint="look"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_a_copy_says_the_same(error: PipoError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and copy.args == error.args
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("name", errors.__all__)
def test_every_kind_can_be_copied(name: str) -> None:
    kind = getattr(errors, name)
    error = kind.__new__(kind)
    error.__dict__ |= {"message": "m", "hint": None, "extra": [1]}
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and copy.__dict__ == error.__dict__


def test_those_with_more_to_say_are_among_them() -> None:
    assert {MalformedProfile.__name__, OutOfDeviceMemory.__name__} <= set(errors.__all__)
