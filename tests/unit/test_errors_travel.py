"""base.errors: every error goes to another process and arrives as what it was."""

from __future__ import annotations

import pickle

import pytest

from pipo.base import errors
from pipo.base.errors import PipoError

SPECIAL = {
    errors.MalformedProfile: errors.MalformedProfile("devices[0].name", "a text", 5),
    errors.OverBudget: errors.OverBudget("needs more", smallest_bytes=5, hint="take more"),
    errors.OutOfDeviceMemory: errors.OutOfDeviceMemory("no memory", wanted_bytes=3, free_bytes=2, hint="less"),
}


def example(kind: type[PipoError]) -> PipoError:
    if kind in SPECIAL:
        return SPECIAL[kind]
    if issubclass(kind, errors.TransferError):
        return kind("cannot read", path="model.gguf", offset=7, wanted_bytes=10, got_bytes=3, hint="look")
    return kind("it went wrong", hint="do this")


@pytest.mark.parametrize("name", errors.__all__)
def test_pickled_and_back(name: str) -> None:
    error = example(getattr(errors, name))
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error) and found.args == error.args
    assert vars(found) == vars(error) and found.exit_code == error.exit_code
