"""How an engine is set up: one frozen object, made in one place, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipo.base.adapter import AdapterChoice, choices_of
from pipo.base.cores import available_cores
from pipo.base.errors import UsageError

SCHEDULE_NAMES = ("pipelined", "sequential", "layer")
LAYOUT_NAMES = ("auto", "plain", "repacked", "native")
COMPUTE_NAMES = ("auto", "device")
CACHE_TYPE_NAMES = ("f16", "f32", "q8_0", "q4_0")
MAX_THREADS = 512  # GGML_MAX_N_THREADS of ggml.h; it checks none: 20,000 hang, and 2^31 wrap around to none
ENV_PREFIX = "PIPO_"
_ELSEWHERE = {"PIPO_GGML", "PIPO_TEST_MODEL", "PIPO_API_KEY"}  # read by compute.ggml, the tests and `pipo serve`
# mean nothing without a program that uses what they give, or without the model they are for
_CODE_ONLY = {"trace", "max_outputs", "num_sequences", "lora", "constraints"}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that shapes an engine. None means: chosen for you, and said in the plan.

    `ram` is the anonymous memory of the whole process: a size ("4GB"), a share of what is free ("50%") or "auto".
    `device` is the name of what computes beside the CPU, "cpu" for none, "auto" for the first GPU where there is one;
    `vram` is what may be taken of its memory, a size or "auto". `compute` "device" streams to the device what does not
    fit there; "auto" leaves it to the CPU where that is faster. Routed experts compute on the CPU in any case.
    """

    ram: str = "auto"
    device: str = "auto"
    vram: str = "auto"
    compute: str = "auto"
    context_tokens: int | None = None
    threads: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    schedule: str = "pipelined"
    layout: str = "auto"  # of weights with repacked kernels; "native" wants the file that `pipo pack` writes beside
    prefill_chunk: int | None = None
    max_outputs: int = 1  # positions of one pass that may ask for logits
    num_sequences: int = 1  # that have keys and values at a time, for Engine.complete_batch
    trace: bool = False
    constraints: bool = False  # answers may be held to a schema or a grammar: memory is kept for that
    lora: tuple[AdapterChoice, ...] = ()  # adapters that every sequence has, unless a request says otherwise

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULE_NAMES)
        _check_choice("compute", self.compute, COMPUTE_NAMES)
        _check_choice("layout", self.layout, LAYOUT_NAMES)
        _check_choice("cache_type_k", self.cache_type_k, CACHE_TYPE_NAMES)
        _check_choice("cache_type_v", self.cache_type_v, CACHE_TYPE_NAMES)
        object.__setattr__(self, "lora", choices_of(self.lora))
        for name in ("context_tokens", "threads", "prefill_chunk", "max_outputs", "num_sequences"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{name} must be a whole number, found {value!r:.80}")
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UsageError(
                f"threads must be at most {MAX_THREADS}, found {self.threads}",
                hint=f"this process may use {available_cores()} cores",
            )

    @property
    def num_threads(self) -> int:
        """Compute threads: those asked for, else one per core this process may use."""
        return self.threads or min(available_cores(), MAX_THREADS)


def resolve_config(
    arguments: Mapping[str, object], environment: Mapping[str, str], file: Path | None = None
) -> EngineConfig:
    """argument > environment (PIPO_RAM, …) > TOML file > default; an argument of None was not given.

    Raises UsageError for an unknown or unusable key, naming where it stands.
    """
    unknown = arguments.keys() - {field.name for field in fields(EngineConfig)}
    if unknown:
        known = ", ".join(sorted(_settings()))
        raise UsageError(f"unknown setting {min(unknown)!r:.80}", hint=f"known: {known}")
    config = EngineConfig()
    if file is not None:
        config = _apply(config, _read_toml(file), str(file))
    config = _apply(config, _from_environment(environment), "environment")
    return _with(config, {name: value for name, value in arguments.items() if value is not None})


def _with(config: EngineConfig, values: Mapping[str, Any]) -> EngineConfig:
    """Names were looked up before; `__post_init__` checks the values."""
    return replace(config, **values)


def _apply(config: EngineConfig, values: Mapping[str, object], source: str) -> EngineConfig:
    kinds = _settings()
    for name, value in values.items():
        if name not in kinds:
            raise UsageError(f"{source}: unknown setting {name!r:.80}", hint=f"known: {', '.join(sorted(kinds))}")
        try:
            config = _with(config, {name: _convert(kinds[name], value)})
        except UsageError as error:
            raise UsageError(f"{source}: {name} = {value!r:.80}: {error.message}", hint=error.hint) from error
        except ValueError as error:
            raise UsageError(f"{source}: {name} = {value!r:.80}: {error!s:.200}") from error
    return config


def _convert(kind: str, value: object) -> object:
    if kind.startswith("int"):
        return int(str(value))
    return str(value)


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """What begins with PIPO_, by the names of EngineConfig. Raises UsageError for what is no setting."""
    known = {ENV_PREFIX + name.upper(): name for name in _settings()}
    named = {key: value for key, value in environment.items() if key.startswith(ENV_PREFIX) and key not in _ELSEWHERE}
    for key in named:
        if key not in known:
            raise UsageError(f"environment: unknown setting {key!r:.80}", hint=f"known: {', '.join(sorted(known))}")
    return {known[key]: value for key, value in named.items()}


def _settings() -> dict[str, str]:
    """Names and types of what the environment and the file can say."""
    return {field.name: str(field.type) for field in fields(EngineConfig) if field.name not in _CODE_ONLY}


def _read_toml(file: Path) -> dict[str, object]:
    """Empty where there is no such file."""
    import tomllib

    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02X}",
            hint="save it as UTF-8, the only encoding TOML has",
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}", hint="pipo reads its settings from it") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is not known", hint=f"one of {', '.join(choices)}")
