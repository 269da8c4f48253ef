"""The Python API in two calls.

with pipo.load("model.gguf", ram="4GB") as engine:
    for piece in engine.generate("Once upon a time"):
        print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pipo.base.config import resolve_config
from pipo.base.errors import PipoError
from pipo.engine import Engine
from pipo.generation.adapters import AdapterSet, weights_of_each
from pipo.generation.request import Completion, SamplingParams
from pipo.hardware.budget import ram_bytes
from pipo.model_file import ModelFile
from pipo.plan import TYPICAL
from pipo.store.library import resolve_model
from pipo.text.chat_template import Message

__all__ = ["LLM", "Engine", "PipoError", "SamplingParams", "load"]


def load(model: str | Path, ram: str | int = "auto", **settings: object) -> Engine:
    """Open a model (the path of a file or a folder, or a name that `pipo list` shows) inside a budget, ready to answer.

    `ram` is what `--ram` takes, or bytes; `settings` are the other fields of EngineConfig, such as lora=["style:0.5"].
    Raises PipoError's children.
    """
    config = resolve_config({"ram": str(ram), **settings}, {})
    engine = Engine(ModelFile(resolve_model(str(model)), ram_bytes(config.ram)), config)
    try:
        engine.start(engine.make_plan(workload=replace(TYPICAL, num_sequences=config.num_sequences)))
    except BaseException:
        engine.close()
        raise
    return engine


class LLM:
    """Offline answers to many prompts: `LLM(model, ram="4GB").generate(prompts, SamplingParams(...))`.

    Answers one prompt after another; prompts that begin alike share the keys and values of what they share. With
    `num_sequences=N` N prompts share every sweep of the weights instead, which pays where weights stream.
    """

    def __init__(self, model: str | Path, ram: str | int = "auto", **settings: object) -> None:
        self.engine = load(model, ram, **settings)

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        adapters: Sequence[AdapterSet] | None = None,
    ) -> list[Completion]:
        """One answer per prompt; a single string is one prompt. `adapters` says for each prompt which of the loaded
        ones it has: a name, names with scales, {} for none, None for all of them.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        return self._complete([self.engine.encode(prompt) for prompt in prompts], params, adapters)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapters: Sequence[AdapterSet] | None = None,
    ) -> list[Completion]:
        """The same for conversations."""
        prompts = [self.engine.encode_chat(conversation) for conversation in conversations]
        return self._complete(prompts, params, adapters)

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None,
        adapters: Sequence[AdapterSet] | None,
    ) -> list[Completion]:
        if self.engine.config.num_sequences > 1:
            return self.engine.complete_batch(prompts, params, adapters=adapters)
        # all of them are looked at before the first prompt is answered
        weights = weights_of_each(adapters, len(prompts), self.engine.adapters)
        answers = zip(prompts, weights, strict=True)
        return [self.engine.complete(prompt, params, adapters=each) for prompt, each in answers]

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
