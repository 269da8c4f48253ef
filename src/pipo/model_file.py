"""A model's header and tokenizer: what is needed to count a prompt before there is a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pipo.base.adapter import MAX_ADAPTERS, AdapterChoice, AdapterId, NamedAdapter, free_id
from pipo.base.errors import ContextOverflow, OverBudget, UnsupportedModel, UsageError
from pipo.base.manifest import Manifest
from pipo.base.units import MIB, format_size, round_up
from pipo.formats.adapter import open_adapter
from pipo.formats.checkpoint import Checkpoint, open_checkpoint
from pipo.formats.gguf_metadata import ArrayRef, GgufMetadata
from pipo.formats.hf_text import HfText
from pipo.hardware.memory import process_memory, release_free_memory
from pipo.models.adapters import check_adapter
from pipo.models.registry import check_architecture, stages_of
from pipo.pipeline.blueprint import GROWTH_BYTES
from pipo.planner.placement import smallest_ram_text
from pipo.text.answer_formats import AnswerFormat, answer_format_of
from pipo.text.byte_pairs import MERGES_KEY
from pipo.text.chat_template import TEMPLATE_KEY, ChatTemplate, Message
from pipo.text.contract import ModelTokenizer
from pipo.text.conversation import template_messages
from pipo.text.gguf_text import GgufText, gguf_text_of
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.same_vocabulary import check_same_vocabulary
from pipo.text.tokenizer import Tokenizer
from pipo.text.vocabulary import TOKENS_KEY

# Anonymous memory of the process once everything is imported and the tokenizer is built, by declaration, so that the
# smallest budget is the same number on every run; a process that measures more is charged what it measures.
PROCESS_BYTES = 48 * MIB
IMPORTED_BYTES = 28 * MIB  # before the tokenizer is built; 23 to 26 measured
PROCESS_STEP = 8 * MIB
LONG_TEXT_TOKENS = 4096
# A tokenizer.json as a GGUF takes so many times what building it takes; 1.4 to 2.0 measured for four vocabularies
_CONVERSION = 2.5
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


class ModelFile:
    """A model's header and tokenizer, without weights: what is needed to count a prompt before planning for it.

    Raises ModelNotFound, MalformedFile, UnsupportedModel; OverBudget where building the tokenizer would take more than
    `limit_bytes`, None being no limit. With `header_only` the weights need not be there: such a file can be planned
    for, and no engine takes it. `vocabulary_of` is a model whose vocabulary this one must have, else UsageError: its
    tokenizer serves both.
    """

    def __init__(
        self,
        path: Path,
        limit_bytes: int | None = None,
        *,
        header_only: bool = False,
        vocabulary_of: ModelFile | None = None,
    ) -> None:
        self.path = path
        self.is_header_only = header_only
        self.checkpoint: Checkpoint = open_checkpoint(path, check_architecture, header_only=header_only)
        self.stages = stages_of(self.manifest)
        self.tokenizer: ModelTokenizer
        if vocabulary_of is not None:
            check_same_vocabulary(self.checkpoint, path, vocabulary_of.checkpoint, vocabulary_of.path)
            self.tokenizer = vocabulary_of.tokenizer
            return
        self._check_vocabulary(limit_bytes)
        self.tokenizer = _tokenizer_of(self.checkpoint)
        release_free_memory()

    def _check_vocabulary(self, limit_bytes: int | None) -> None:
        """Before the tokenizer is built: a file of 62 MB can hold one that takes 600 MiB meanwhile."""
        metadata, num_tokens = self.checkpoint.metadata, self.manifest.hyper.vocab_size
        if isinstance(metadata, GgufMetadata):
            tokens = metadata.get(TOKENS_KEY)
            num_tokens = tokens.count if isinstance(tokens, ArrayRef) else 0
        if num_tokens > self.manifest.hyper.vocab_size:
            raise UnsupportedModel(
                f"{self.manifest.name}: the tokenizer has {num_tokens} tokens, the model "
                f"{self.manifest.hyper.vocab_size}"
            )
        # less than any plan needs is left to the plan, which names the smallest budget of all
        least_bytes = PROCESS_BYTES + GROWTH_BYTES
        if limit_bytes is not None:
            _check_building(tokenizer_build_bytes(metadata), num_tokens, limit_bytes, least_bytes)

    @property
    def manifest(self) -> Manifest:
        return self.checkpoint.manifest

    def check_can_run(self) -> None:
        """Raises UsageError where only its header was opened."""
        if self.is_header_only:
            raise UsageError(
                f"{self.path}: was opened for its header alone", hint="open it without header_only to run it"
            )

    @property
    def has_weights(self) -> bool:
        """The files are as long as they must be, and have no holes: what is read from them tells of a drive."""
        ends = [0] * len(self.manifest.files)
        for extent in (extent for spec in self.manifest.tensors.values() for extent in spec.extents):
            ends[extent.file_idx] = max(ends[extent.file_idx], extent.end)
        facts = [file.stat() for file in self.manifest.files]
        return all(
            fact.st_size >= end and 2 * _BLOCK_BYTES * fact.st_blocks >= end  # half: file systems that compress
            for fact, end in zip(facts, ends, strict=True)
        )

    def open_adapters(self, choices: Iterable[AdapterChoice]) -> list[NamedAdapter]:
        """Headers of adapters, each checked to be one for this model. Raises ModelError, UsageError, ReadFailed."""
        opened: dict[AdapterId, NamedAdapter] = {}
        for choice in choices:
            named = self.open_adapter(choice, opened)
            opened[named.id] = named
        return list(opened.values())

    def open_adapter(self, choice: AdapterChoice, others: Mapping[AdapterId, object]) -> NamedAdapter:
        """Named as none of the others is."""
        if len(others) >= MAX_ADAPTERS:
            raise UsageError(f"{choice.path}: there are {len(others)} adapters already, the most that can be")
        adapter = open_adapter(choice.path)
        check_adapter(adapter, self.manifest, self.stages)
        return NamedAdapter(free_id(adapter.name, others), adapter, float(choice.scale))

    def most_bytes(self, num_tokens: int) -> int:
        """No text of more UTF-8 bytes fits into `num_tokens` tokens."""
        return num_tokens * self.tokenizer.longest_token_bytes

    def encode(self, prompt: str, max_tokens: int | None = None, *, parse_special: bool = True) -> list[int]:
        """Token ids of plain text. Special-token text in it is read as such, as llama.cpp's tools do.

        Raises ContextOverflow, before it takes memory for them, where there are many more than `max_tokens`.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt must be a string, not {type(prompt).__name__}")
        self._refuse_longer(prompt, max_tokens, parse_special=parse_special)
        ids = self.tokenizer.encode(prompt, add_special=True, parse_special=parse_special)
        return _after_encoding(ids)

    @property
    def template_source(self) -> str | None:
        """Of the model's own chat template, None where it has none."""
        source = self.checkpoint.metadata.get(TEMPLATE_KEY)
        return source if isinstance(source, str) else None

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """How the model writes tool calls and thinking."""
        return answer_format_of(self.template_source)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """A conversation in the words of OpenAI's API, as the model was trained to read it. `variables` are for the
        template alone. Raises UsageError when the model has no chat template, or what is no conversation.
        """
        made = template_messages(messages, self.answer_format.tools.id_chars)
        return self.chat_template.render(made, tools=tools, variables=variables)

    def encode_chat(self, messages: Sequence[Message], max_tokens: int | None = None) -> list[int]:
        """Token ids of a conversation. Raises as `render_chat` and `encode`."""
        return self.encode_rendered(self.render_chat(messages), max_tokens)

    def encode_rendered(self, rendered: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of what `render_chat` gave. Raises as `encode`."""
        self._refuse_longer(rendered, max_tokens, parse_special=True)
        return _after_encoding(self.tokenizer.encode_chat(rendered))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's own, compiled once. Raises UsageError where it has none, MalformedFile."""
        ids = self.tokenizer.special_ids
        names = [None if i is None else self.tokenizer.token_text(i) for i in (ids.bos, ids.eos)]
        return ChatTemplate.from_metadata(self.checkpoint.metadata, names[0], names[1])

    def _refuse_longer(self, text: str, max_tokens: int | None, *, parse_special: bool) -> None:
        if max_tokens is not None and self.tokenizer.is_longer(text, max_tokens, parse_special=parse_special):
            raise ContextOverflow(
                f"a prompt of {len(text)} characters does not fit the context of {max_tokens} tokens",
                hint="a shorter prompt, or a larger context where the model has one",
            )


def process_bytes_now() -> int:
    """What this process takes, or will once it is ready."""
    return max(PROCESS_BYTES, round_up(process_memory().anonymous_bytes, PROCESS_STEP))


def _after_encoding(ids: list[int]) -> list[int]:
    """Token ids as they are; what encoding a long text has taken goes back: 20 MiB after 32k tokens."""
    if len(ids) >= LONG_TEXT_TOKENS:
        release_free_memory()
    return ids


def gguf_text_of_folder(checkpoint: Checkpoint, limit_bytes: int) -> GgufText | None:
    """The tokenizer of a folder as keys of a GGUF; None for a GGUF, which has them.

    Raises OverBudget where that would take more than `limit_bytes`, UnsupportedModel for what a GGUF cannot say.
    """
    if not isinstance(checkpoint.metadata, HfText):
        return None
    build_bytes = int(_CONVERSION * tokenizer_build_bytes(checkpoint.metadata))
    _check_building(build_bytes, checkpoint.manifest.hyper.vocab_size, limit_bytes, 0)
    text = gguf_text_of(checkpoint.metadata, checkpoint.manifest.name)
    release_free_memory()
    return text


def _check_building(build_bytes: int, num_tokens: int, limit_bytes: int, least_bytes: int) -> None:
    """Raises OverBudget, but not where `least_bytes` are enough."""
    needed = IMPORTED_BYTES + build_bytes
    if needed <= max(limit_bytes, least_bytes):
        return
    raise OverBudget(
        f"needs {format_size(needed)} of RAM at least, the limit is {format_size(limit_bytes)}\n"
        f"  building a tokenizer of {num_tokens} tokens takes {format_size(build_bytes)} · "
        f"process {format_size(IMPORTED_BYTES)}",
        smallest_bytes=needed,
        hint=f"the smallest --ram that builds it is {smallest_ram_text(needed)}",
    )


def _tokenizer_of(checkpoint: Checkpoint) -> ModelTokenizer:
    if isinstance(checkpoint.metadata, HfText):
        return HfTokenizer.from_files(checkpoint.metadata)
    return Tokenizer.from_metadata(checkpoint.metadata)


def tokenizer_build_bytes(metadata: GgufMetadata | HfText) -> int:
    """The most that building a tokenizer takes, from the sizes of its arrays or of its JSON alone.

    Measured 640 to 1030 bytes for a token with its merge (49k to 1M of them, 8 to 70 bytes long), where this says 670
    to 1100; 250 to 330 for a sentence piece, where this says 360 to 560. Of a tokenizer.json 330 to 420 for a token,
    210 for a merge, 380 for one that is a pair, 510 to 600 for a token of Unigram: this says 380 to 420, 210, 540 and
    560 to 620.
    """
    if isinstance(metadata, HfText):
        size = metadata.tokenizer_size  # a token of BPE has a colon, a merge none, a pair is a list
        num_others = max(size.num_commas - size.num_colons, 0)
        return 4 * size.num_bytes + 300 * size.num_colons + 170 * num_others + 160 * size.num_lists
    arrays = [metadata.get(key) for key in (TOKENS_KEY, MERGES_KEY)]
    refs = [ref for ref in arrays if isinstance(ref, ArrayRef)]
    return sum(280 * ref.count + 10 * ref.num_bytes // 3 for ref in refs)
