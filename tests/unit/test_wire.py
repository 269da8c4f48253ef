"""serving.wire and generation.inbox: messages arrive whole, in order, or the end does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from pipo.generation.events import Cancel, Command, RequestId, Submit
from pipo.generation.inbox import CommandQueue, Iterated
from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.serving.wire import Asked, Wire
from tests.support.transfers import deadline


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    """Of two pipes, one each way."""
    (here, their_end), (there, our_end) = os.pipe(), os.pipe()
    ours = Wire(os.fdopen(here, "rb"), os.fdopen(our_end, "wb"))
    theirs = Wire(os.fdopen(there, "rb"), os.fdopen(their_end, "wb"))
    with deadline(20):
        yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_of_several_threads_arrive_whole(ends: tuple[Wire, Wire]) -> None:
    ours, theirs = ends
    messages = [
        Asked((Submit(RequestId(i), GenerationRequest([i] * 20_000, SamplingParams(seed=i))),)) for i in range(4)
    ]
    threads = [threading.Thread(target=ours.send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()  # each fills the pipe and waits for who reads
    found = [theirs.receive() for _ in messages]
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == sorted(messages, key=str)
    theirs.send("there and back")
    assert ours.receive() == "there and back"


@pytest.mark.parametrize("data", [b"", b"\x05", b"\x05" + bytes(7), b"\x05" + bytes(7) + b"ab"])
def test_the_end_in_the_middle_of_a_message(data: bytes) -> None:
    source, target = os.pipe()
    os.write(target, data)
    os.close(target)
    with pytest.raises(EOFError), open(source, "rb") as stream, open(os.devnull, "wb") as nothing:  # noqa: PTH123
        Wire(stream, nothing).receive()


def test_sending_to_nobody_is_an_error() -> None:
    source, target = os.pipe()
    os.close(source)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        wire = Wire(nothing, os.fdopen(target, "wb"))
        with pytest.raises(OSError):
            wire.send("hello")
        wire.close()


def test_an_inbox_wakes_who_waits() -> None:
    inbox, taken = CommandQueue(), []

    def take() -> None:
        while (commands := inbox.take(waits=True)) is not None:
            taken.extend(commands)

    thread = threading.Thread(target=take)
    thread.start()
    commands: list[Command] = [Cancel(RequestId(i)) for i in range(5)]
    with deadline(20):
        for command in commands:
            inbox.put([command])
        inbox.close()
        thread.join()
    assert taken == commands
    assert inbox.take(waits=False) is None


def test_an_inbox_does_not_wait_where_there_is_work() -> None:
    inbox = CommandQueue()
    assert list(inbox.take(waits=False) or ()) == []


def test_requests_are_taken_as_there_is_room() -> None:
    room = [True, True, False, True, True]
    requests = [GenerationRequest([i], SamplingParams()) for i in range(3)]
    inbox = Iterated(iter(requests), lambda: room.pop(0))
    found = [inbox.take(waits=False) for _ in range(5)]
    assert found == [
        [Submit(RequestId(0), requests[0])], [Submit(RequestId(1), requests[1])], [],
        [Submit(RequestId(2), requests[2])], None,
    ]  # fmt: skip
