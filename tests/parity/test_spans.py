"""Passes that mix tokens of several sequences: each gets what it would get alone, wherever the weights live."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from pipo.base.adapter import AdapterId
from pipo.base.clock import RealClock
from pipo.base.config import SCHEDULE_NAMES, EngineConfig
from pipo.base.errors import Cancelled, ReadFailed
from pipo.base.trace import NullTracer
from pipo.compute.devices import CpuBackend
from pipo.pipeline import assembly
from pipo.pipeline.adapters import Weights
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.forward import Forward
from pipo.pipeline.spans import Span
from pipo.planner.placement import KV_CACHE, place, smallest_bytes
from pipo.transfer.disk import DiskTransfer
from tests.support.random_adapters import write_random_adapter
from tests.support.rigs import FloatArray, Rig
from tests.support.served import Request, Served, alone, random_requests, serve
from tests.support.tiny_models import MIXTURES, SPECS, make_model, rounded_model, write_gguf

CHUNK, NUM_SEQUENCES, CONTEXT = 24, 6, 600
# prompts and answers: more than there are sequences, so that these are used again; two classes of KV length
LENGTHS = [(40, 5), (3, 9), (17, 2), (300, 6), (1, 12), (60, 4), (25, 3), (2, 7), (9, 9)]
# where a row's product does not depend on how many there are, nothing may differ at all: of F16 and F32, ggml computes
# one row with other kernels than several
EXACT = {GgufType.Q4_0}
MAX_ERROR = 2e-3  # elsewhere, of the largest logit


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model, how its weights and its keys and values are stored, and whether sequences have adapters."""

    model: str
    type: GgufType
    cache: str = "f16"
    has_adapters: bool = False

    @property
    def is_exact(self) -> bool:
        """Routers are F32: products that differ by a bit may choose others."""
        return self.type in EXACT and SPECS[self.model].family not in MIXTURES

    def __str__(self) -> str:
        return f"{self.model}-{self.type.name}-{self.cache}{'-lora' if self.has_adapters else ''}"


Q4_0, F16, F32 = GgufType.Q4_0, GgufType.F16, GgufType.F32
CASES = [
    *(Case("llama-wide-heads", type, cache) for type in (Q4_0, F16, F32) for cache in ("f16", "q8_0")),
    Case("gemma2", Q4_0),
    Case("gemma2", F16, "q8_0"),
    Case("phi3-sliding", Q4_0),
    Case("opt", F32),
    Case("qwen3moe", Q4_0),
    Case("qwen3moe", F16, "q8_0"),
    Case("gpt-oss", F32),
    Case("llama-wide-heads", Q4_0, has_adapters=True),
    Case("llama-wide-heads", F16, "q8_0", has_adapters=True),
    Case("gemma2", Q4_0, has_adapters=True),
]
SOME = [CASES[0], Case("gemma2", F16, "q8_0"), Case("qwen3moe", Q4_0), Case("llama-wide-heads", Q4_0, "f16", True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spans")


@lru_cache
def model_file(folder: Path, name: str, type: GgufType) -> Path:
    path = folder / f"{name}-{type.name}.gguf"
    write_gguf(make_model(SPECS[name]), path, type)
    return path


@contextmanager
def opened(case: Case, folder: Path, num_sequences: int = NUM_SEQUENCES) -> Iterator[Rig]:
    path = model_file(folder, case.model, case.type)
    config = EngineConfig(
        threads=2, layout="plain", prefill_chunk=CHUNK, max_outputs=CHUNK, cache_type_k=case.cache,
        cache_type_v=case.cache, num_sequences=num_sequences,
    )  # fmt: skip
    with Rig(path, config, context_tokens=CONTEXT if case.model != "opt" else 256) as rig:
        if not case.has_adapters:
            yield rig
            return
        names = [
            write_random_adapter(path, folder / f"{name}.gguf", rank=3 + i, strength=1.0, seed=i)
            for i, name in enumerate("ab")
        ]
        yield rig.with_adapters(*names)


def requests_of(case: Case) -> list[Request]:
    adapters: Sequence[Weights] = [{}]
    if case.has_adapters:
        adapters = [{AdapterId("a"): 1.0}, {}, {AdapterId("b"): 0.5, AdapterId("a"): 0.1}]
    lengths = [(min(prompt, 200), answer) for prompt, answer in LENGTHS] if case.model == "opt" else LENGTHS
    return random_requests(SPECS[case.model].vocab_size, lengths, adapters)


def assert_same_bits(got: FloatArray, want: FloatArray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def assert_served_alike(got: Served, want: Served) -> None:
    assert got.ends == want.ends
    for request, rows in want.logits.items():
        assert_same_bits(np.stack(got.logits[request]), np.stack(rows))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_sequence_gets_what_it_gets_alone(case: Case, folder: Path) -> None:
    """Whoever else is in its passes, in whatever order they come and go, holes between them or not."""
    with opened(case, folder) as rig, rig.running(rig.all_resident()) as forward:
        requests = requests_of(case)
        served = serve(forward, requests, seed=1)
        assert served.num_mixed > 5 and served.num_with_holes > 5
        for i, request in enumerate(requests):
            got, want = np.stack(served.logits[i]), alone(forward, request, served.ends[i])
            assert np.isfinite(want).all() and want.std() > 0.1
            if case.is_exact:
                assert_same_bits(got, want)
            assert np.abs(got - want).max() <= MAX_ERROR * np.abs(want).max()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_streamed_passes_are_resident_ones_bit_for_bit(case: Case, folder: Path) -> None:
    """At every budget and with every schedule, though units move as sequences grow and are released."""
    with opened(case, folder) as rig:
        requests = requests_of(case)[:6]
        with rig.running(rig.all_resident()) as forward:
            want = serve(forward, requests, seed=3)
        for i, placement in enumerate(rig.placements(3)[:2]):
            with rig.running(placement, schedule=SCHEDULE_NAMES[i]) as forward:
                assert_served_alike(serve(forward, requests, seed=3), want)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_copied_prefix_is_one_that_was_computed(case: Case, folder: Path) -> None:
    """Also into a sequence that held another text, while the source goes on."""
    with opened(case, folder) as rig, rig.running(rig.placements(2)[0]) as forward:
        request, other = requests_of(case)[0], requests_of(case)[2]
        ends = [CHUNK, CHUNK + 7, len(request.prompt), *range(len(request.prompt) + 1, len(request.text) + 1)]
        want = alone(forward, request, ends, sequence=3)
        forward.forget()
        forward.use_adapters([request.adapters] * NUM_SEQUENCES)
        forward.run(other.text, 0, [], sequence=4)
        forward.run(request.prompt[:CHUNK], 0, [], sequence=1)
        assert forward.can_copy_rows
        forward.copy_rows(1, 4, CHUNK)
        rows, start = [], CHUNK
        for end in ends[1:]:
            part = request.text[start:end]
            found = forward.run_spans([Span(sequence, start, part, True) for sequence in (4, 1)])
            np.testing.assert_array_equal(found[0], found[1])
            rows.append(found[0].copy())
            start = end
        rows = rows[1:]  # those of the prompt's end and after
        assert np.abs(np.stack(rows) - want).max() <= MAX_ERROR * np.abs(want).max()
        if case.is_exact:
            assert_same_bits(np.stack(rows), want)


class Reads:
    """A preadv that does something at its nth call from now on."""

    def __init__(self) -> None:
        self.left = 0
        self.what: Callable[[], None] = lambda: None

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.left -= 1
        if self.left == 0:
            self.what()
        return os.preadv(fd, buffers, offset)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr(assembly, "DiskTransfer", partial(DiskTransfer, preadv=reads))
    return reads


def begin(forward: Forward, requests: Sequence[Request]) -> list[Span]:
    """Two sequences that have read their prompts; a pass that goes on with them and begins a third."""
    first, second, third = requests[:3]
    for sequence, request in ((4, first), (0, third)):
        for part, start in chunks(request.prompt):
            forward.run(part, start, [], sequence)
    return [
        Span(4, len(first.prompt), first.answer[:1], True),
        Span(2, 0, second.prompt, True),
        Span(0, len(third.prompt), third.answer[:1], True),
    ]


@pytest.mark.parametrize("case", SOME[:3], ids=str)
def test_a_mixed_pass_that_was_cut_short_is_made_again(case: Case, folder: Path, reads: Reads) -> None:
    """What the sequences held before it is what it was."""
    with opened(case, folder) as rig:
        assert isinstance(rig.compute.backend, CpuBackend)
        abort, requests = rig.compute.backend.abort, requests_of(case)
        with rig.running(rig.all_resident()) as forward:
            want = forward.run_spans(begin(forward, requests)).copy()
        with rig.running(rig.placements(2)[0]) as forward:
            spans, used = begin(forward, requests), forward.kv_used_bytes
            reads.left, reads.what = 3, abort.set
            with pytest.raises(Cancelled):
                forward.run_spans(spans)
            abort.clear()
            assert_same_bits(forward.run_spans(spans), want)
            forward.release(2)
            assert forward.kv_used_bytes == used
            assert_same_bits(forward.run_spans(spans), want)


@pytest.mark.parametrize("case", SOME[:3], ids=str)
def test_after_a_failed_read_every_pass_says_so(case: Case, folder: Path, reads: Reads) -> None:
    """And memory is given back all the same, whoever asks for it."""

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with opened(case, folder) as rig, rig.running(rig.placements(2)[0]) as forward:
        spans, used = begin(forward, requests_of(case)), forward.kv_used_bytes
        reads.left, reads.what = 3, fail
        for _ in range(2):
            with pytest.raises(ReadFailed):
                forward.run_spans(spans)
        forward.release(2)
        assert forward.kv_used_bytes == used
        for sequence in (4, 0):
            forward.release(sequence)
        assert forward.kv_used_bytes == rig.blueprint.kv_shape(CONTEXT).used_bytes(0) < used


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_hidden_state_is_what_the_head_reads(case: Case, folder: Path) -> None:
    """Of a text in several chunks, in any sequence; where weights stream, no byte of the head is read for it."""
    with opened(case, folder) as rig:
        text, states = requests_of(case)[0].text, []
        for placement in (rig.all_resident(), place(rig.demand(smallest_bytes(rig.demand())))):
            with rig.running(placement) as forward:
                whole = [forward.run(part, start, [len(part) - 1])[0] for part, start in chunks(text)][-1].copy()
                states.append(forward.embed(text, sequence=2))
                without, normed, read = (
                    bytes_read(forward, again)
                    for again in (
                        lambda: forward.run(text[:CHUNK], 0),
                        lambda: forward.embed(text[:CHUNK]),
                        lambda: forward.run(text[:CHUNK], 0, [0]),
                    )
                )
                assert without == normed <= read and (read > normed or not placement.streamed_bytes)
        assert_same_bits(states[0], states[1])
        weights = truth_head(case)
        logits = weights @ states[0].astype(np.float64)
        cap = rig.blueprint.manifest.hyper.final_softcap
        logits = np.tanh(logits / cap) * cap if cap else logits
        assert np.abs(logits - whole).max() < 0.02 * np.abs(whole).max(), "the head rounds what it multiplies to 8 bits"


def bytes_read(forward: Forward, again: Callable[[], object]) -> int:
    """Of a pass like the one before."""
    again()
    forward.take_stats()
    again()
    return forward.take_stats().bytes_read


def chunks(text: Sequence[int]) -> list[tuple[Sequence[int], int]]:
    return [(text[start : start + CHUNK], start) for start in range(0, len(text), CHUNK)]


def truth_head(case: Case) -> FloatArray:
    """(vocab, hidden)"""
    weights: FloatArray = rounded_model(make_model(SPECS[case.model]), case.type).lm_head.weight.detach().numpy()
    return weights


def test_memory_is_charged_by_sequence(folder: Path) -> None:
    """And goes back where one is released; the plan's sum is never exceeded."""
    case = CASES[0]
    with opened(case, folder) as rig:
        placement = place(rig.demand(smallest_bytes(rig.demand())))
        assert placement.borrowers
        parts = Assembly(rig.blueprint, placement, CONTEXT, placement.num_bytes, RealClock(), NullTracer())
        forward, ledger = parts.forward, parts.ledger

        def charged() -> int:
            return ledger.breakdown().get(KV_CACHE, 0)

        try:
            used, num_resident = [], []
            for sequence in (5, 0, 2, 1, 4, 3):
                for start in range(0, CONTEXT, CHUNK):
                    forward.run_spans([Span(sequence, start, [7] * CHUNK, False)])
                used.append(charged())
                num_resident.append(ledger.breakdown().get("resident weights", 0))
                assert charged() == forward.kv_used_bytes and ledger.in_use_bytes <= placement.num_bytes
            page = 2 * SPECS[case.model].num_layers * 2 * 4096
            assert all(abs(each - (i + 1) * used[0]) <= page for i, each in enumerate(used))
            assert num_resident == sorted(num_resident, reverse=True) and num_resident[0] > num_resident[-1]
            for sequence in (0, 2, 1, 4):
                forward.release(sequence)
            assert charged() == forward.kv_used_bytes == used[1]
            forward.run_spans([Span(0, 0, [9], False)])
            assert ledger.breakdown()["resident weights"] > num_resident[-1], "what left came back"
            for sequence in (5, 3, 0):
                forward.release(sequence)
            assert charged() == forward.kv_used_bytes == 0
        finally:
            parts.close()
        assert ledger.in_use_bytes == 0 and ledger.peak_bytes <= placement.num_bytes


def test_where_passes_cannot_mix_the_results_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep for the single tokens, and one for each longer span."""
    with opened(CASES[0], folder) as rig:
        requests = requests_of(CASES[0])[:5]
        with rig.running(rig.all_resident()) as forward:
            want = serve(forward, requests, seed=2)
            few = forward.take_stats().num_passes
        monkeypatch.setattr(Forward, "can_mix", False)
        with rig.running(rig.all_resident()) as forward:
            assert_served_alike(serve(forward, requests, seed=2), want)
            assert forward.take_stats().num_passes > few


def test_more_longer_spans_than_a_pass_has_groups_for(folder: Path) -> None:
    """Several sweeps, in whose order nothing of the results is."""
    with opened(CASES[0], folder, num_sequences=12) as rig, rig.running(rig.all_resident()) as forward:
        requests = requests_of(CASES[0])[:1]
        texts = [requests[0].text[i : i + 2] for i in range(11)]
        want = [forward.run(text, 0, [1], sequence=i)[0].copy() for i, text in enumerate(texts)]
        forward.forget()
        forward.take_stats()
        spans = [Span(i, 0, text, i != 4) for i, text in enumerate(texts)]
        got = forward.run_spans(spans[::-1]).copy()
        assert forward.take_stats().num_passes == 2
        assert_same_bits(got, np.stack([row for i, row in enumerate(want) if i != 4][::-1]))
