"""The flags that several verbs take, in groups, and what each group makes of them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, get_type_hints

import typer

from pipo.base.config import CACHE_TYPE_NAMES, COMPUTE_NAMES, LAYOUT_NAMES, SCHEDULE_NAMES, EngineConfig, resolve_config
from pipo.base.errors import UsageError
from pipo.base.folders import config_folder
from pipo.generation.request import SamplingParams

_MEMORY, _COMPUTE, _SAMPLING = "Memory", "Compute", "Sampling"
_DEFAULTS = SamplingParams()
_KIND = inspect.Parameter.KEYWORD_ONLY
MAX_SEQUENCES = 4096  # that anybody may ask for


def _one_of(names: tuple[str, ...]) -> str:
    return "|".join(names)


@dataclass(frozen=True, slots=True)
class MemoryFlags:
    """What shapes a plan. None: not given."""

    ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|PERCENT|auto",
            help="Memory of the whole process: 4GB, 512MiB, 50% of what is free, or auto.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    vram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|auto", help="Memory of the device, for what computes there.", rich_help_panel=_MEMORY
        ),
    ] = None
    ctx_size: Annotated[
        int | None,
        typer.Option(
            "-c",
            "--ctx-size",
            min=1,
            metavar="N",
            help="Tokens of prompt plus answer; of a window for `eval`.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    cache_type_k: Annotated[
        str | None,
        typer.Option(metavar=_one_of(CACHE_TYPE_NAMES), help="Type of cached keys.", rich_help_panel=_MEMORY),
    ] = None
    cache_type_v: Annotated[
        str | None,
        typer.Option(metavar=_one_of(CACHE_TYPE_NAMES), help="Type of cached values.", rich_help_panel=_MEMORY),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(metavar=_one_of(LAYOUT_NAMES), help="Layout of weights in RAM.", rich_help_panel=_MEMORY),
    ] = None
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Prompt tokens per pass; chosen for you otherwise.", rich_help_panel=_MEMORY
        ),
    ] = None

    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="A LoRA adapter: a GGUF file or a folder of PEFT's; may be repeated.",
            rich_help_panel=_MEMORY,
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, object]:
        """By the names of EngineConfig."""
        return {
            "ram": self.ram,
            "vram": self.vram,
            "context_tokens": self.ctx_size,
            "cache_type_k": self.cache_type_k,
            "cache_type_v": self.cache_type_v,
            "layout": self.layout,
            "prefill_chunk": self.prefill_chunk,
            "lora": tuple(self.lora) if self.lora else None,
        }

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in self.arguments.values())


@dataclass(frozen=True, slots=True)
class ComputeFlags:
    """What shapes a run, not its plan."""

    threads: Annotated[
        int | None,
        typer.Option(
            "-t", "--threads", min=1, metavar="N", help="Compute threads; one per core.", rich_help_panel=_COMPUTE
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME|cpu|auto", help="What computes beside the CPU.", rich_help_panel=_COMPUTE),
    ] = None
    compute: Annotated[
        str | None,
        typer.Option(metavar=_one_of(COMPUTE_NAMES), help="Where stages compute.", rich_help_panel=_COMPUTE),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(metavar=_one_of(SCHEDULE_NAMES), help="How reads and compute overlap.", rich_help_panel=_COMPUTE),
    ] = None

    @property
    def arguments(self) -> dict[str, object]:
        return {
            "threads": self.threads,
            "device": self.device,
            "compute": self.compute,
            "schedule": self.schedule,
        }


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """How to choose tokens and when to end."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            min=1,
            metavar="N",
            help="Tokens of answer at most; 256 for `run`.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    temp: Annotated[
        float, typer.Option("--temp", metavar="T", help="Temperature; 0 is greedy.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.temperature
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Keep the K likeliest; 0 keeps all.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.top_k
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Keep the likeliest that reach P together.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.top_p
    min_p: Annotated[
        float,
        typer.Option(metavar="P", help="Keep those at least P times as likely as the best.", rich_help_panel=_SAMPLING),
    ] = _DEFAULTS.min_p
    repeat_penalty: Annotated[
        float, typer.Option(metavar="X", help="Divide the score of recent tokens; 1 is off.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.repeat_penalty
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtract once from recent tokens.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.presence_penalty
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtract per occurrence.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.frequency_penalty
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Same seed, same answer; drawn otherwise.", rich_help_panel=_SAMPLING),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be repeated.", rich_help_panel=_SAMPLING),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end token.", rich_help_panel=_SAMPLING)
    ] = False

    def params(self, max_tokens: int | None, logprobs: int | None = None) -> SamplingParams:
        """Raises UsageError."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """How much is said besides the answer."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the answer, and errors.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Causes, memory, tracebacks.")] = False


JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
ProbeFlag = Annotated[bool, typer.Option("--probe", help="Measure drive, copies, repacking and compute, once.")]
FreshFlag = Annotated[bool, typer.Option("--fresh", help="With --probe: measure again what is known.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A .gguf file, a Hugging Face folder, or a name from `pipo list`.", show_default=False
    ),
]
ModelFlag = Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="The model, as a flag.")]
SystemFlag = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]


def parse_num_sequences(text: str) -> int | None:
    """None: as many as the planner finds best. Raises UsageError."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_SEQUENCES:
        raise UsageError(f"--num-sequences {text!r:.40} must be auto, or a number from 1 to {MAX_SEQUENCES}")
    return int(text)


def make_config(
    memory: MemoryFlags, compute: ComputeFlags, *, trace: bool = False, constraints: bool = False
) -> EngineConfig:
    """argument > environment > file > default. Raises UsageError."""
    if memory.vram is not None and compute.device is not None and compute.device.lower() == "cpu":
        raise UsageError("--vram and --device cpu contradict each other", hint="leave one of them out")
    arguments = memory.arguments | compute.arguments | {"trace": trace or None, "constraints": constraints or None}
    return resolve_config(arguments, os.environ, config_folder() / "config.toml")


@dataclass(frozen=True, slots=True)
class Call:
    """A verb and its arguments: what a command line comes to. Nothing runs before `run`."""

    verb: Callable[..., None]
    arguments: Mapping[str, object]

    @property
    def output(self) -> OutputFlags:
        output = self.arguments.get("output")
        return output if isinstance(output, OutputFlags) else OutputFlags()

    def run(self) -> None:
        self.verb(**self.arguments)


def spread(verb: Callable[..., None]) -> Callable[..., Call]:
    """Show typer the fields of a verb's flag groups as parameters of their own. What typer calls makes a Call."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, own in inspect.signature(verb).parameters.items():
        group = groups.get(name)
        parameters += _fields_of(group) if group else [own.replace(annotation=hints[name], kind=_KIND)]

    @functools.wraps(verb)
    def flat(**values: object) -> Call:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return Call(verb, values | made)

    flat.__dict__["__signature__"] = inspect.Signature(parameters)  # what inspect, and so typer, asks first
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _fields_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(field.name, _KIND, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
