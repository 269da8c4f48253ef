"""`pipo chat`: a conversation whose earlier turns stay in the KV cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from pipo.base.errors import ContextOverflow, UsageError
from pipo.cli.flags import (
    ComputeFlags,
    MemoryFlags,
    ModelArgument,
    ModelFlag,
    OutputFlags,
    SamplingFlags,
    SystemFlag,
    make_config,
)
from pipo.cli.prompt import check_stdin, only_model, piped_lines
from pipo.cli.terminal import print_error, print_note, stderr, write_answer

if TYPE_CHECKING:
    from pipo.cli.answer import Answer
    from pipo.cli.session import Session

PROMPT = ">>> "
_ROOM_HINT = "/clear begins anew; `pipo chat -c N` takes a larger context"
COMMANDS = {
    "/clear": "forget the conversation; the system prompt stays",
    "/system TEXT": "set the system prompt; without TEXT show it",
    "/stats": "what the last answer cost, and who holds the memory",
    "/exit": "end; so does Ctrl-D",
    "/help": "this",
}


def chat(
    model: ModelArgument = None,
    model_flag: ModelFlag = None,
    system: SystemFlag = None,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
    sampling: SamplingFlags,
) -> None:
    """Talk with a model, within a memory budget.

    Ctrl-C stops an answer; at the prompt it ends the chat, as Ctrl-D does. /help lists the commands.
    """
    name = only_model(model, model_flag)
    config = make_config(memory, compute)
    sampling.params(sampling.max_tokens)
    check_stdin()

    from pipo.cli.session import open_model, open_session
    from pipo.plan import TYPICAL

    opened = open_model(name, config.ram)
    opened.encode_chat([{"role": "user", "content": "hello"}])  # refuse a model without template now
    with open_session(opened, config, None, output, TYPICAL) as session:
        conversation = Conversation(session, sampling, system)
        if sys.stdin.isatty() and not output.quiet:
            print_note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        for line in _lines(opened.most_bytes(session.plan.context_tokens)):
            if not conversation.take(line):
                return


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(self, session: Session, sampling: SamplingFlags, system: str | None) -> None:
        self._session = session
        self._sampling = sampling
        self._system = system
        self._turns: list[dict[str, object]] = []

    def take(self, line: str) -> bool:
        """Do what a line asks. False when it ends the chat."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(*line.split(maxsplit=1))
        if line:
            self._say(line)
        return True

    def _command(self, name: str, argument: str = "") -> bool:
        if name == "/exit":
            return False
        if name == "/clear":
            self._turns.clear()
            print_note("the conversation begins anew")
        elif name == "/system":
            self._set_system(argument)
        elif name == "/stats":
            self._session.print_details()
        else:
            if name != "/help":
                print_note(f"there is no command {name}")
            for usage, what in COMMANDS.items():
                print_note(f"  {usage:<14}{what}")
        return True

    def _set_system(self, text: str) -> None:
        self._system = text or self._system
        print_note(f"system prompt: {self._system}" if self._system is not None else "there is no system prompt")

    def _say(self, text: str) -> None:
        """Answer one message. One that does not fit, or was stopped before a word came, is not kept."""
        self._turns.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except (ContextOverflow, UsageError) as error:
            self._turns.pop()
            print_error(error.message, error.hint)
            return
        if answer.text:
            self._turns.append({"role": "assistant", "content": answer.text})
        else:
            self._turns.pop()

    def _answer(self) -> Answer:
        """Raises ContextOverflow, and UsageError where the template refuses the messages."""
        from pipo.cli.answer import Answer, stream_answer
        from pipo.generation.request import FinishReason

        engine, context = self._session.engine, self._session.plan.context_tokens
        ids = engine.encode_chat(self._messages)
        room = context - len(ids)
        if room < 1:
            raise ContextOverflow(
                f"the conversation has {len(ids)} tokens, the context {context}: there is no room for an answer",
                hint=_ROOM_HINT,
            )
        params = self._sampling.params(min(self._sampling.max_tokens or room, room))
        texts: list[str] = []

        def show(text: str) -> None:
            texts.append(text)
            write_answer(text)

        try:
            answer = stream_answer(engine, ids, params, self._session.output, show)
        except KeyboardInterrupt:
            answer = Answer("".join(texts), (), FinishReason.CANCELLED)
        self._end_answer(answer, len(ids), room)
        return answer

    def _end_answer(self, answer: Answer, num_prompt: int, room: int) -> None:
        from pipo.generation.request import FinishReason

        write_answer("\n")
        report = self._session.engine.report
        num_tokens = num_prompt + (0 if report is None else report.num_generated)
        usage = f"{num_tokens} of {self._session.plan.context_tokens} tokens"
        if answer.finish is FinishReason.CANCELLED:
            self._session.print_cost("stopped", usage)
        elif answer.finish is FinishReason.LENGTH and len(answer.tokens) < room:
            self._session.print_cost(f"cut at {len(answer.tokens)} tokens by -n", usage)
        else:
            self._session.print_cost(usage)
        if answer.finish is FinishReason.LENGTH and len(answer.tokens) == room:
            print_note(f"the context is full, the answer may be cut: {_ROOM_HINT}")

    @property
    def _messages(self) -> list[dict[str, object]]:
        if self._system is None:
            return self._turns
        return [{"role": "system", "content": self._system}, *self._turns]


def _lines(max_bytes: int) -> Iterator[str]:
    """What is typed, or piped in, until it ends."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from piped_lines(max_bytes)
        return
    with suppress(ImportError):  # Windows has none, and edits lines itself
        import readline  # noqa: F401 - gives `input` editing and history

    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            stderr().print()
            return
        yield line
