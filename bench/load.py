"""Many clients at once against `pipo serve`: does it keep answering, keep its budget, and let go of who leaves?

    python -m bench load --clients 64 --seconds 300 smollm2
    python -m bench load --clients 8 --seconds 20 smollm2 -- --ram 300MB

Starts a server, asks it with prompts and answers of mixed lengths, hangs up on a share of them, and watches the ledger
and the memory of its processes meanwhile. What stands behind `--` is for `pipo serve`. The exit code is 1 where an
answer was wrong, memory went above the budget, or something of a request was left at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import httpx
from rich.console import Console

from bench.anonymous_peak import anonymous_bytes
from pipo.base.units import format_size

WORDS = (
    "the",
    "tide",
    "rises",
    "because",
    "moon",
    "pulls",
    "at",
    "water",
    "in",
    "every",
    "sea",
    "and",
    "shore",
    "waits",
)
ANSWER_TOKENS = (4, 16, 64, 200)
PROMPT_WORDS = (4, 40, 200, 800)
LEAVES = 0.2  # of requests are hung up on
TIMEOUT_S = 600.0
MOST_GROWTH = 1.1  # of memory, from the second third of the time to the last
LEAST_TELLING = 20  # samples of a third
SETTLE_S = 10.0  # for what was cancelled to be gone
_ADDRESS = re.compile(r"at (http://\S+)")


@dataclass(slots=True)
class Tally:
    """What clients saw."""

    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_left: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Sample:
    """`anonymous_bytes` is of the server's processes together."""

    at_s: float
    anonymous_bytes: int
    ledger_bytes: int
    num_running: int
    num_waiting: int


def main(arguments: Sequence[str]) -> int:
    args, serve_flags = _parse(arguments)
    console = Console(width=120)
    with serving(args.model, serve_flags) as (process, url):
        limit_bytes = int(httpx.get(f"{url}/stats", timeout=TIMEOUT_S).json()["engine"]["limit_bytes"])
        tally, samples = asyncio.run(_load(url, process.pid, args.clients, args.seconds, args.seed))
    return report(console, tally, samples, limit_bytes)


@contextmanager
def serving(model: str, flags: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address."""
    command = [sys.executable, "-m", "pipo", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="")
            if found := _ADDRESS.search(line):
                yield process, found[1]
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


async def _load(url: str, pid: int, num_clients: int, seconds: float, seed: int) -> tuple[Tally, list[Sample]]:
    tally, samples = Tally(), list[Sample]()
    end_s = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=num_clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:
        watcher = asyncio.ensure_future(_watch(http, pid, samples))
        await asyncio.gather(*(_client(http, random.Random(seed + i), tally, end_s) for i in range(num_clients)))
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        samples.append(await _settled(http, pid))
    return tally, samples


async def _client(http: httpx.AsyncClient, rng: random.Random, tally: Tally, end_s: float) -> None:
    while time.monotonic() < end_s:
        try:
            await _ask(http, rng, tally, end_s)
        except httpx.HTTPError as error:
            tally.errors[type(error).__name__] += 1
            await asyncio.sleep(0.1)


async def _ask(http: httpx.AsyncClient, rng: random.Random, tally: Tally, end_s: float) -> None:
    """One request; the end of the load hangs up too."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.choice(PROMPT_WORDS)))
    max_tokens = rng.choice(ANSWER_TOKENS)
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    leaves_after = rng.randrange(max_tokens) if rng.random() < LEAVES else None
    begin, first, last, num_chunks, usage = time.monotonic(), 0.0, 0.0, 0, None
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        tally.statuses[str(reply.status_code)] += 1
        if reply.status_code != 200:
            await asyncio.sleep(float(reply.headers.get("retry-after", "1")))
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                tally.errors[str(chunk["error"]["code"] or chunk["error"]["message"])] += 1
                return
            usage = chunk["usage"] or usage
            last = time.monotonic()
            first = first or last
            num_chunks += 1
            if last > end_s or num_chunks == leaves_after:
                tally.num_left += 1
                return
    if usage is None:
        tally.errors["a stream without its end"] += 1
        return
    _note(tally, usage["completion_tokens"], first - begin, last - first)


def _note(tally: Tally, num_tokens: int, ttft_s: float, decode_s: float) -> None:
    tally.num_tokens += num_tokens
    tally.ttfts_s.append(ttft_s)
    if num_tokens > 1:
        tally.tpots_s.append(decode_s / (num_tokens - 1))


async def _watch(http: httpx.AsyncClient, pid: int, samples: list[Sample]) -> None:
    begin = time.monotonic()
    while True:
        samples.append(await _sample(http, pid, time.monotonic() - begin))
        await asyncio.sleep(1.0)


async def _sample(http: httpx.AsyncClient, pid: int, at_s: float) -> Sample:
    engine = (await http.get("/stats")).json()["engine"]
    held = sum(engine["ledger"].values())
    return Sample(at_s, anonymous_bytes(pid), held, engine["num_running"], engine["num_waiting"])


async def _settled(http: httpx.AsyncClient, pid: int) -> Sample:
    """The last sample: nothing runs, or it never comes to that."""
    deadline = time.monotonic() + SETTLE_S
    while (sample := await _sample(http, pid, -1.0)).num_running + sample.num_waiting:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return sample


def report(console: Console, tally: Tally, samples: Sequence[Sample], limit_bytes: int) -> int:
    """Print what was seen; the exit code."""
    for name, values in (("first token", tally.ttfts_s), ("each token", tally.tpots_s)):
        console.print(f"{name:<14} {_quantiles(values)}", highlight=False)
    console.print(f"{'tokens':<14} {tally.num_tokens} in whole answers", highlight=False)
    console.print(f"{'statuses':<14} {dict(tally.statuses)}", highlight=False)
    console.print(f"{'hung up on':<14} {tally.num_left}", highlight=False)
    console.print("\n    s   anonymous      ledger  running  waiting", highlight=False)
    for sample in samples[:: max(len(samples) // 12, 1)]:
        sizes = f"{format_size(sample.anonymous_bytes):>11} {format_size(sample.ledger_bytes):>11}"
        console.print(f"{sample.at_s:5.0f} {sizes} {sample.num_running:8} {sample.num_waiting:8}", highlight=False)
    faults = list(_faults(tally, samples, limit_bytes))
    for fault in faults:
        console.print(f"wrong: {fault}", style="red", highlight=False)
    return 1 if faults else 0


def _quantiles(values: Sequence[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    p95 = ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
    return f"p50 {median(ordered):.3f} s, p95 {p95:.3f} s, of {len(ordered)} answers"


def _faults(tally: Tally, samples: Sequence[Sample], limit_bytes: int) -> Iterator[str]:
    if not tally.ttfts_s:
        yield "no answer at all"
    for error, count in tally.errors.items():
        yield f"{count} times {error}"
    for status, count in tally.statuses.items():
        if status not in ("200", "429", "503"):
            yield f"{count} answers of status {status}"
    peak = max(sample.anonymous_bytes for sample in samples)
    if peak > limit_bytes:
        yield f"{format_size(peak)} of anonymous memory, more than the limit of {format_size(limit_bytes)}"
    under_load = [sample for sample in samples if sample.num_running]
    yield from _growth("anonymous memory", [sample.anonymous_bytes for sample in under_load])
    yield from _growth("the ledger", [sample.ledger_bytes for sample in under_load])
    if samples[-1].num_running + samples[-1].num_waiting:
        yield f"{samples[-1].num_running} requests run although nobody waits for them"


def _growth(what: str, values: Sequence[int]) -> Iterator[str]:
    """What is not flat: more in the last third than in the one before. In the first, caches fill."""
    third = len(values) // 3
    if third < LEAST_TELLING:
        return
    before, after = median(values[third : 2 * third]), median(values[2 * third :])
    if after > before * MOST_GROWTH:
        yield f"{what} grew from {format_size(round(before))} to {format_size(round(after))}"


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    return parser.parse_args(arguments[:at]), list(arguments[at + 1 :])
