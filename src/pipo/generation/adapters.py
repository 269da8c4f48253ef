"""Which of an engine's adapters a request has, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipo.base.adapter import AdapterId, NamedAdapter, check_scale
from pipo.base.errors import UsageError
from pipo.pipeline.adapters import Weights

# None: all that are loaded, with the scales they came with; a name: that one; names with scales: those, none if empty
AdapterSet = str | Mapping[AdapterId, float] | Mapping[str, float] | None
Loaded = Mapping[AdapterId, NamedAdapter]


def weights_of(choice: AdapterSet, loaded: Loaded) -> Weights:
    """Without those of which there is nothing. Raises UsageError."""
    if choice is None:
        choice = {each.id: each.scale for each in loaded.values()}
    elif isinstance(choice, str):
        choice = {choice: find_adapter(choice, loaded).scale}
    if not isinstance(choice, Mapping):
        raise UsageError(f"adapters of a request must be a name, or names with scales, not {choice!r:.80}")
    for name, scale in choice.items():
        check_scale(scale, str(name))
    return {find_adapter(name, loaded).id: float(scale) for name, scale in choice.items() if scale}


def weights_of_each(choices: Sequence[AdapterSet] | None, num_prompts: int, loaded: Loaded) -> list[Weights]:
    """The same for the prompts of a batch; None: every one has all. Raises UsageError."""
    if choices is None:
        choices = [None] * num_prompts
    if isinstance(choices, str | Mapping) or len(choices) != num_prompts:
        raise UsageError(f"adapters of {num_prompts} prompts must be a list of as many entries, not {choices!r:.80}")
    return [weights_of(choice, loaded) for choice in choices]


def find_adapter(name: object, loaded: Loaded) -> NamedAdapter:
    """Raises UsageError where there is none of this name."""
    for named in loaded.values():
        if named.id == name:
            return named
    known = ", ".join(f"{each:.80}" for each in loaded) or "none"
    raise UsageError(f"there is no adapter {name!r:.80}", hint=f"loaded are: {known}")
