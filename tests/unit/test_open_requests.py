"""generation.open_requests: what an event loop hears of requests that are answered elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from pipo.base.errors import ContextOverflow, EngineBusy, EngineDied
from pipo.generation.answer import Piece
from pipo.generation.events import Cancel, Command, Embed, Embedding, RequestId, Submit
from pipo.generation.open_requests import OpenRequests
from pipo.generation.request import GenerationRequest, SamplingParams, Summary, Usage
from pipo.generation.waiting import QueueSize

REQUEST = GenerationRequest([1, 2], SamplingParams())
SUMMARY = Summary(Usage(2, 1), 0.0, 0.1, 0.2)


class Desk:
    """Keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Command] = []
        self.open = OpenRequests(self.asked.append)

    async def read(self) -> list[Piece | Summary]:
        return [what async for what in self.open.stream(REQUEST)]


def test_pieces_then_the_summary_and_nothing_is_cancelled() -> None:
    async def main() -> None:
        desk = Desk()
        one, other = (asyncio.ensure_future(desk.read()) for _ in range(2))
        await asyncio.sleep(0)
        assert desk.asked == [Submit(RequestId(0), REQUEST), Submit(RequestId(1), REQUEST)]
        pieces = [Piece(None, text) for text in "abc"]
        desk.open.deliver([(RequestId(0), pieces[0]), (RequestId(1), pieces[1]), (RequestId(0), SUMMARY)])
        assert await one == [pieces[0], SUMMARY]
        desk.open.deliver([(RequestId(0), pieces[2]), (RequestId(1), ContextOverflow("too long"))])
        with pytest.raises(ContextOverflow):
            await other
        assert len(desk.asked) == 2 and not len(desk.open)

    asyncio.run(main())


def test_closing_cancels_and_what_still_comes_is_dropped() -> None:
    async def main() -> None:
        desk = Desk()
        async with aclosing(desk.open.stream(REQUEST)) as pieces:
            first = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            desk.open.deliver([(RequestId(0), Piece(None, "a"))])
            await first
        assert desk.asked[-1] == Cancel(RequestId(0))
        desk.open.deliver([(RequestId(0), Piece(None, "b")), (RequestId(0), SUMMARY)])
        assert not len(desk.open)

    asyncio.run(main())


def test_embeddings() -> None:
    async def main() -> None:
        desk = Desk()
        task = asyncio.ensure_future(desk.open.embed([3, 4]))
        await asyncio.sleep(0)
        assert desk.asked == [Embed(RequestId(0), [3, 4])]
        desk.open.deliver([(RequestId(0), Embedding([0.6, 0.8]))])
        assert await task == [0.6, 0.8]
        task = asyncio.ensure_future(desk.open.embed([3, 4]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.asked[-1] == Cancel(RequestId(1))

    asyncio.run(main())


def test_the_end_of_who_answers_ends_all() -> None:
    async def main() -> None:
        desk = Desk()
        tasks = [asyncio.ensure_future(desk.read()) for _ in range(3)]
        await asyncio.sleep(0)
        desk.open.fail(EngineDied("it has ended"))
        for task in tasks:
            with pytest.raises(EngineDied):
                await task
        with pytest.raises(EngineDied):
            await desk.read()
        assert len(desk.asked) == 3, "nobody is asked any more"

    asyncio.run(main())


def test_no_more_are_open_than_may_be() -> None:
    async def main() -> None:
        desk = Desk()
        desk.open.most = QueueSize(num_requests=2, prompt_tokens=4).beside(num_sequences=1, context_tokens=3)
        tasks = [asyncio.ensure_future(desk.read()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="3 requests with 6 tokens"):
            await desk.read()
        tasks.pop().cancel()
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy):
            await desk.open.embed([1] * 4)
        desk.open.fail(EngineDied("it has ended"))
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
