"""What the parent asks a child process, and what comes back. Sent as pickles over pipes, so: plain frozen data.

Nothing of pipo is imported here: children of peers run where pipo is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from pipo.base.manifest import Extent
    from pipo.hardware.drive import DriveRate  # noqa: F401 - named in a string below
    from pipo.transfer.disk import DriveSettings

R = TypeVar("R")


class Request(Generic[R]):
    """A question whose answer is an R."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer of a child that could not do what was asked. It stays alive."""

    message: str


# answers


@dataclass(frozen=True, slots=True)
class Started:
    """`seconds` from the opening of the file to ready; imports are not in it. `library` says what computes."""

    seconds: float
    library: str


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What pipo means to do. Without room for the model only `smallest_bytes` counts."""

    fits: bool
    smallest_bytes: int = 0
    needed_bytes: int = 0  # of the budget
    weight_bytes: int = 0  # of all stages
    resident_bytes: int = 0
    streamed_bytes: int = 0  # per pass
    chunk_tokens: int = 0
    repacked_types: tuple[str, ...] = ()
    drive: DriveSettings | None = None  # how the engine reads
    streamed_extents: tuple[Extent, ...] = ()


@dataclass(frozen=True, slots=True)
class Passes:
    """Decode passes. `seconds` of each, or their mean once where an engine tells no more.

    Seconds count from token to token as a caller sees them: gathering, computing and sampling included.
    """

    num_passes: int
    seconds: tuple[float, ...]
    bytes_read: int = 0
    compute_s: float = 0.0
    stall_s: tuple[tuple[str, float], ...] = ()
    peak_anonymous_bytes: int = 0
    experts: tuple[tuple[str, float], ...] = ()  # of a mixture: how many were needed, there, guessed, missed


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A prompt that no cache knows, up to the first token of the answer."""

    num_tokens: int
    seconds: float
    num_passes: int = 1
    bytes_read: int = 0
    peak_anonymous_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PassForecast:
    """What the planner's simulator says of a steady pass, from figures measured on this machine."""

    seconds: float
    compute_s: float
    drive_s: float


@dataclass(frozen=True, slots=True)
class ExpertReplay:
    """Misses of the routing that was recorded, with as many slots: of policies by name, of which the engine has one."""

    num_slots: int
    num_experts: int
    num_needed: int
    misses: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Passes that gave a token to each sequence of a batch, what the plan said one would take, and all answers."""

    passes: Passes
    predicted_s: float
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LoneAnswer:
    """Tokens of one sequence that had every pass to itself, and how much likelier each was than the second best, as
    the difference of their logits.
    """

    token_ids: tuple[int, ...]
    leads: tuple[float, ...]


# requests


@dataclass(frozen=True, slots=True)
class PipoSetup:
    """`threads`, `layout` and `schedule` as in EngineConfig. `request`: tokens of prompt and answer it is planned for,
    as `pipo run` plans; None plans for none.
    """

    path: Path
    ram_bytes: int
    context_tokens: int
    threads: int | None
    schedule: str = "pipelined"
    layout: str = "auto"
    prefill_chunk: int | None = None
    request: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LlamaSetup:
    """llama.cpp. `site` is the folder that holds the package, for one that is not installed.

    `mode` is "default", "mapped" (weights stay in the mapped file, as they must where they do not fit: no repacking) or
    "direct" (read with direct I/O while it starts).
    """

    path: Path
    context_tokens: int
    threads: int
    vocab_size: int
    mode: str = "default"
    site: Path | None = None
    num_sequences: int = 1  # that may be decoded together


@dataclass(frozen=True, slots=True)
class FolderSetup:
    """An engine that reads a Hugging Face folder, told to keep `ram_bytes` of weights and buffers in memory."""

    path: Path
    ram_bytes: int
    threads: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Library(Request[str]):
    """Which libggml, from where."""


@dataclass(frozen=True, slots=True)
class Plan(Request[PlanFacts]):
    setup: PipoSetup


@dataclass(frozen=True, slots=True)
class Forecast(Request[PassForecast]):
    """Of passes of `num_tokens`, each of which continues the prompt of the one before."""

    setup: PipoSetup
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Start(Request[Started]):
    setup: PipoSetup | LlamaSetup | FolderSetup


@dataclass(frozen=True, slots=True)
class Prepare(Request[None]):
    """Write whatever the engine wants to find on disk before it starts. Without a limit, and never timed."""

    setup: FolderSetup


@dataclass(frozen=True, slots=True)
class Decode(Request[Passes]):
    """After the same few tokens each time, or after those that begin with `first_token` and count up: what a mixture
    of experts reads depends on what it says.
    """

    num_passes: int
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class ReplayExperts(Request["ExpertReplay"]):
    """Of all that was decoded since the engine started."""


@dataclass(frozen=True, slots=True)
class Greedy(Request[tuple[int, ...]]):
    """The first tokens of the answer that `Decode` times. Not timed: an engine may take more time to tell them."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeBatch(Request[Passes]):
    """As many sequences at once; a pass gives a token to each."""

    num_sequences: int
    num_passes: int


@dataclass(frozen=True, slots=True)
class Batch(Request[BatchFacts]):
    """Of an engine of its own, planned for these sequences, prompts and passes."""

    setup: PipoSetup
    num_sequences: int
    prompt_tokens: int
    num_passes: int


@dataclass(frozen=True, slots=True)
class AnswerAlone(Request["tuple[LoneAnswer, ...]"]):
    """The prompts of a `Batch`, one after another, by the engine that has started."""

    num_prompts: int
    prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prefill(Request[FirstToken]):
    """`seed` makes the prompt; a new one meets no cached prefix."""

    num_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ReadDrive(Request["tuple[DriveRate, ...]"]):
    """Measure the drive over these extents. Wants an idle machine."""

    files: tuple[Path, ...]
    extents: tuple[Extent, ...]
    combos: tuple[DriveSettings, ...]
    seconds: float
