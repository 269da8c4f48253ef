"""Engines on the nodes of a Ray cluster, as one: each request goes to the node with the least to do.

Ray is an extra, `pipo[ray]`. Why actors and not Ray Data: a job is resumed from a journal that hears of every row as it
is answered, in the driver; and an output keeps its input's types and bytes, which Ray Data's readers and writers do
not (numbers of a CSV, keys of JSON lines). Ray Data retries blocks; here a worker that dies costs the rows it had open.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from pipo.base.errors import PipoError, UsageError
from pipo.base.units import MIB
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest
from pipo.jobs.engine_plan import EngineSpec, plan_num_sequences, start_engine
from pipo.serving.contract import EngineClient, EngineInfo, EngineStats, Summary

LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0
LOCAL_STORE_BYTES = 100 * MIB  # requests and answers are some KB; Ray takes no less than 75 MB
MAX_SEQUENCES = 256  # of a worker that plans for itself: it does not know how many rows there are
LOST_AFTER_S = 120.0  # with no worker alive


@dataclass(frozen=True, slots=True)
class RayPlace:
    """Where: `local` starts Ray here, `auto` takes the cluster that Ray finds, anything else is an address.

    `num_workers` None: one for each node.
    """

    address: str
    num_workers: int | None = None


class RayWorker:
    """The actor: one engine, planned for the node it is on. Started by the first call, also after a restart."""

    def __init__(self, spec: EngineSpec, num_sequences: int | None) -> None:
        self._spec = spec
        self._num_sequences = num_sequences
        self._client: EngineClient | None = None
        self._lock = asyncio.Lock()

    async def info(self) -> EngineInfo | PipoError:
        try:
            return (await self._started()).info
        except PipoError as error:  # an answer: what is raised comes out of Ray in another shape
            return error

    async def answer(self, request: GenerationRequest) -> list[Piece | Summary] | PipoError:
        try:
            client = await self._started()
            return [piece async for piece in client.stream(request)]
        except PipoError as error:
            return error

    async def stats(self) -> EngineStats:
        return EngineStats() if self._client is None else await self._client.stats()

    async def process_id(self) -> int:
        return os.getpid()

    async def _started(self) -> EngineClient:
        async with self._lock:
            if self._client is None:
                num = self._num_sequences
                if num is None:
                    num = await asyncio.to_thread(plan_num_sequences, self._spec, MAX_SEQUENCES)
                config = replace(self._spec.config, num_sequences=num)
                workload = replace(self._spec.workload, num_sequences=num)
                self._client = await start_engine(replace(self._spec, config=config, workload=workload))
            return self._client


@dataclass(eq=False, slots=True)
class _Worker:
    actor: Any
    info: EngineInfo
    process_id: int
    num_open: int = 0
    is_alive: bool = True
    waking: asyncio.Task[None] | None = field(default=None)


class RayEngines:
    """An EngineClient over the workers. Threads: an event loop's."""

    def __init__(self, ray: ModuleType, workers: Sequence[_Worker]) -> None:
        self._ray = ray
        self._workers = workers
        self._has_revived = asyncio.Event()

    @classmethod
    async def start(cls, place: RayPlace, spec: EngineSpec, num_sequences: int | None) -> RayEngines:
        """Once every worker's engine runs. `spec.config.ram` is what each node resolves for itself.

        Raises PipoError, and UsageError where Ray is not here.
        """
        ray = _connected(place)
        try:
            actors = [each.remote(spec, num_sequences) for each in _actor_classes(ray, place)]
            infos = [await actor.info.remote() for actor in actors]
            for info in infos:
                if isinstance(info, PipoError):
                    raise info
            ids = [await actor.process_id.remote() for actor in actors]
            return cls(ray, [_Worker(*each) for each in zip(actors, infos, ids, strict=True)])
        except ray.exceptions.RayError as error:
            ray.shutdown()
            raise PipoError(f"Ray could not start the workers: {error!s:.400}") from error
        except BaseException:
            ray.shutdown()
            raise

    @property
    def info(self) -> EngineInfo:
        infos = [worker.info for worker in self._workers]
        num_sequences, limit = sum(info.num_sequences for info in infos), sum(info.limit_bytes for info in infos)
        return replace(infos[0], num_sequences=num_sequences, limit_bytes=limit)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
        """The whole answer at once: a worker that dies has then said nothing, and another one is asked."""
        while True:
            worker = await self._least_busy()
            worker.num_open += 1
            try:
                found = await worker.actor.answer.remote(request)
                break
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.RaySystemError):
                self._lose(worker)
            except self._ray.exceptions.RayError as error:
                raise PipoError(f"a worker failed: {error!s:.400}") from error
            finally:
                worker.num_open -= 1
        if isinstance(found, PipoError):
            raise found
        for piece in found:
            yield piece

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        raise UsageError("workers of a batch have no embeddings")

    async def stats(self) -> EngineStats:
        """Sums over those that are alive; seconds are of all of them."""
        alive = [worker for worker in self._workers if worker.is_alive]
        found = await asyncio.gather(*(_stats(worker) for worker in alive), return_exceptions=True)
        known = [each for each in found if isinstance(each, EngineStats)]
        names = ("num_waiting", "num_running", "num_passes", "bytes_read", "compute_s", "anonymous_bytes")
        sums: dict[str, Any] = {name: sum(getattr(each, name) for each in known) for name in names}
        # they sweep side by side: passes and bytes of all in the time of one
        return EngineStats(**sums, wall_s=max((each.wall_s for each in known), default=0.0))

    async def close(self) -> None:
        for worker in self._workers:
            if worker.waking is not None:
                worker.waking.cancel()
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor)
        self._ray.shutdown()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers when they started."""
        return [worker.process_id for worker in self._workers]

    async def _least_busy(self) -> _Worker:
        while not (alive := [worker for worker in self._workers if worker.is_alive]):
            self._has_revived.clear()
            try:
                await asyncio.wait_for(self._has_revived.wait(), LOST_AFTER_S)
            except TimeoutError as error:
                raise PipoError("every worker of the Ray cluster is gone", hint="--resume goes on") from error
        return min(alive, key=lambda worker: worker.num_open / worker.info.num_sequences)

    def _lose(self, worker: _Worker) -> None:
        """Until Ray has started it anew."""
        if worker.is_alive:
            worker.is_alive = False
            worker.waking = asyncio.create_task(self._wake(worker))

    async def _wake(self, worker: _Worker) -> None:
        while not worker.is_alive:
            with suppress(self._ray.exceptions.RayError):
                info = await worker.actor.info.remote()
                if isinstance(info, EngineInfo):
                    worker.is_alive = True
                    self._has_revived.set()
                    return
            await asyncio.sleep(1.0)


async def _stats(worker: _Worker) -> EngineStats:
    found = await worker.actor.stats.remote()
    assert isinstance(found, EngineStats)
    return found


def _connected(place: RayPlace) -> ModuleType:
    """Raises UsageError, PipoError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers otherwise
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray, which is not here", hint="pip install 'pipo[ray]'") from error
    if place.address not in (LOCAL, AUTO):
        _check_answers(place.address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if place.address == LOCAL:
            cores = max(place.num_workers or 1, os.cpu_count() or 1)
            store = LOCAL_STORE_BYTES
            ray.init(num_cpus=cores, object_store_memory=store, include_dashboard=False, address="local", **quiet)
        else:
            ray.init(address=place.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PipoError(f"--ray {place.address}: no cluster answers: {error!s:.300}") from error
    module: ModuleType = ray
    return module


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes. Raises UsageError for what is no address, PipoError where nobody listens."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"--ray {address!r:.80} is no address", hint="host:port of the cluster's head, auto, or local")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise PipoError(f"--ray {address}: no cluster answers: {error}") from error


def _actor_classes(ray: ModuleType, place: RayPlace) -> list[Any]:
    """One for each worker, bound to its node; nodes take turns where there are more workers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    actor = ray.remote(RayWorker)
    return [
        actor.options(
            num_cpus=1,
            max_restarts=-1,
            max_concurrency=10_000,  # of what waits in its engine's queue
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[i % len(nodes)], soft=False),
        )
        for i in range(place.num_workers or len(nodes))
    ]
