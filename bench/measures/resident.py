"""Is pipo as fast as llama.cpp when the model fits? Every build of libggml against every llama.cpp, interleaved."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from bench.child import ChildFailed
from bench.lab import Lab, Running, peers
from bench.messages import Decode, Prefill
from bench.providers import providers
from bench.rows import Row, Target, at_least, row, skipped
from pipo.hardware.memory import available_memory

LEAST_OF_PEER = 0.95  # as fast, but for noise
LEAST_PREFILL_OF_NATIVE = 0.9  # of a llama.cpp built for this machine
_PASSES_PER_ROUND = 4  # times the setting: a resident pass is short
_COPIES = 1.15  # memory of one engine, by the size of the file

_Rates = dict[str, list[float]]


def measure(lab: Lab) -> Iterator[Row]:
    wanted = int(_COPIES * lab.file_bytes * (len(providers(lab.settings.native_site)) + len(peers(lab.settings)) + 1))
    if wanted > available_memory().limit_bytes:
        yield skipped("tokens/s", "all", f"all engines at once want {wanted / 1e9:.0f} GB")
        return
    engines: dict[str, Running] = {}
    for name, running in _start(lab):
        if isinstance(running, str):
            yield skipped("start", name, running)
        else:
            engines[name] = running
            yield row("open to ready", name, "s", [running.start_s], note=running.library)
    decode, prefill = _run_rounds(lab, engines)
    for what, rates in (("decode", decode), (f"prefill {lab.settings.prompt_tokens}", prefill)):
        yield from _rows(what, rates)


def _start(lab: Lab) -> Iterator[tuple[str, Running | str]]:
    setup = lab.setup(lab.roomy_bytes)
    for provider in providers(lab.settings.native_site):
        yield f"pipo, {provider.name}", lab.start_pipo(setup, provider=provider)
    for kind in peers(lab.settings):
        try:
            yield f"llama.cpp, {kind}", lab.start_llama(kind)
        except ChildFailed as failure:
            yield f"llama.cpp, {kind}", str(failure)


def _run_rounds(lab: Lab, engines: dict[str, Running]) -> tuple[_Rates, _Rates]:
    """Tokens per second by engine, one sample per round. Whoever goes first changes from round to round."""
    decode: _Rates = {name: [] for name in engines}
    prefill: _Rates = {name: [] for name in engines}
    names = list(engines)
    for round_idx in range(lab.settings.rounds + 1):
        shift = round_idx % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            child = engines[name].child
            first_token = child.ask(Prefill(lab.settings.prompt_tokens if round_idx else 8, seed=round_idx + 1))
            passes = child.ask(Decode(lab.settings.passes * _PASSES_PER_ROUND))
            if round_idx:
                decode[name].append(1 / mean(passes.seconds))
                prefill[name].append(first_token.num_tokens / first_token.seconds)
    return decode, prefill


def _rows(what: str, rates: _Rates) -> Iterator[Row]:
    for name, samples in rates.items():
        yield row(what, name, "tok/s", samples)
    ours = [name for name in rates if name.startswith("pipo")]
    for name in ours:
        for peer in (name for name in rates if name not in ours):
            ratios = [own / their for own, their in zip(rates[name], rates[peer], strict=True)]
            yield row(f"{what} ÷ {peer}", name, "×", ratios, _target(what, name, peer))


def _target(what: str, own: str, peer: str) -> Target | None:
    """None where the peer has a newer libggml than pipo was given: its kernels would be compared, not pipo."""
    is_fair = "llama-cpp-python" in own or "llama-cpp-python" not in peer
    if not is_fair:
        return None
    is_native_prefill = what.startswith("prefill") and "llama-cpp-python" in peer
    return at_least(LEAST_PREFILL_OF_NATIVE if is_native_prefill else LEAST_OF_PEER)
