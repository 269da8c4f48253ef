"""`pipo serve`: OpenAI's and Anthropic's APIs over HTTP, and a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pipo.base.units import format_size
from pipo.cli.flags import (
    ComputeFlags,
    MemoryFlags,
    ModelArgument,
    ModelFlag,
    OutputFlags,
    make_config,
    parse_num_sequences,
)
from pipo.cli.prompt import only_model

if TYPE_CHECKING:
    from pipo.base.config import EngineConfig
    from pipo.hardware.probe import Progress
    from pipo.model_file import ModelFile
    from pipo.server.settings import Limits, ServerSettings
    from pipo.serving.contract import EngineInfo, ServedEngine
    from pipo.serving.wire import EngineSetup

_LISTEN, _LIMITS = "Server", "Limits"
MOST_SEQUENCES = 8  # that share a sweep where nobody says how many


@dataclass(frozen=True, slots=True)
class LimitFlags:
    """What one request, one client and all of them may take. None: the default of `server.settings.Limits`."""

    max_requests: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests at a time; 64.", rich_help_panel=_LIMITS)
    ] = None
    max_choices: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Answers one request may ask for; 16.", rich_help_panel=_LIMITS),
    ] = None
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of a prompt; what the context holds.", rich_help_panel=_LIMITS),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            min=1,
            metavar="N",
            help="Tokens of an answer; what the context holds.",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    max_request_time: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Of one request; 3600.", rich_help_panel=_LIMITS)
    ] = None
    max_body: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of a request; 256KiB and 16 bytes a token of context.", rich_help_panel=_LIMITS
        ),
    ] = None
    max_header: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a request's head; 16KiB.", rich_help_panel=_LIMITS)
    ] = None
    read_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For a request to arrive; 30.", rich_help_panel=_LIMITS),
    ] = None
    write_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For a client to read its answer; 30.", rich_help_panel=_LIMITS),
    ] = None
    ping_interval: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Between signs of life on a stream; 15.", rich_help_panel=_LIMITS),
    ] = None

    def limits(self) -> Limits:
        """Raises UsageError."""
        from pipo.base.units import parse_size
        from pipo.server.settings import Limits

        given = {
            "max_requests": self.max_requests,
            "max_choices": self.max_choices,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_tokens": self.max_tokens,
            "max_request_s": self.max_request_time,
            "max_body_bytes": None if self.max_body is None else parse_size(self.max_body, what="--max-body"),
            "max_header_bytes": None if self.max_header is None else parse_size(self.max_header, what="--max-header"),
            "read_timeout_s": self.read_timeout,
            "write_timeout_s": self.write_timeout,
            "ping_s": self.ping_interval,
        }
        return Limits.of(given)


def serve(
    model: ModelArgument = None,
    model_flag: ModelFlag = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen.", rich_help_panel=_LISTEN)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 takes one that is free.", rich_help_panel=_LISTEN)
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PIPO_API_KEY",
            show_envvar=True,
            metavar="KEY",
            help="What clients must send; as a flag, others on this machine can see it.",
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages that may ask; may be repeated.", rich_help_panel=_LISTEN),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="What requests call the model.", rich_help_panel=_LISTEN)
    ] = None,
    num_sequences: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help=f"Requests that share a sweep; auto: {MOST_SEQUENCES}, or fewer where memory is short.",
            rich_help_panel=_LISTEN,
        ),
    ] = "auto",
    scored_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of a prompt that are scored in a pass; each takes memory.",
            rich_help_panel=_LISTEN,
        ),
    ] = 8,
    constraints: Annotated[
        bool,
        typer.Option(
            help="Keep memory for answers that follow a schema, a regex or a grammar.", rich_help_panel=_LISTEN
        ),
    ] = True,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
    limits: LimitFlags,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page for a browser.

    Listens on this machine alone, unless --host says otherwise.
    """
    name = only_model(model, model_flag)
    config = make_config(memory, compute)
    wanted = parse_num_sequences(num_sequences)
    config = replace(config, num_sequences=wanted or 1, max_outputs=scored_tokens, constraints=constraints)

    from pipo.cli.session import open_model
    from pipo.cli.terminal import print_warning
    from pipo.server.connection import listen
    from pipo.server.settings import ServerSettings

    settings = ServerSettings(
        alias or _served_name(name), host, port, api_key, tuple(cors_origin or ()), limits.limits()
    )
    with listen(host, port, settings.limits) as listener:
        opened = open_model(name, config.ram)
        if not settings.is_loopback and api_key is None:
            print_warning(f"anybody who reaches {host} can use this server: --api-key asks for a key")
        most = MOST_SEQUENCES if wanted is None else None
        _Serving(opened, config, most, settings, output, listener.getsockname()[1]).run(listener)


def _served_name(name: str) -> str:
    """What the user called it; of a path the file's name, without where it lies."""
    path = Path(name)
    return path.name.removesuffix(".gguf") if path.exists() else name


class _Serving:
    """One run of the server, and what it says."""

    def __init__(
        self,
        model: ModelFile,
        config: EngineConfig,
        most_sequences: int | None,
        settings: ServerSettings,
        output: OutputFlags,
        port: int,
    ) -> None:
        self._model = model
        self._config = config
        self._most_sequences = most_sequences
        self._settings = settings
        self._output = output
        self._port = port

    def run(self, listener: object) -> None:
        import socket

        from pipo.cli.session import starting
        from pipo.server.prompts import Prompts
        from pipo.server.run import serve as run_server
        from pipo.server.service import Service
        from pipo.serving.client import open_engine

        assert isinstance(listener, socket.socket)
        service = Service(self._settings, Prompts.of_model(self._model))
        setup = self._setup()

        async def open_one(progress: Progress) -> ServedEngine:
            with starting(self._output) as say:

                def tell(step: str, fraction: float) -> None:
                    progress(step, fraction)
                    say(step, fraction)

                progress("planning", 0.0)
                return await open_engine(setup, tell)

        run_server(service, listener, open_one, self._say_ready)

    def _setup(self) -> EngineSetup:
        """What this process takes of the budget is known once everything is imported and the tokenizer is there."""
        from pipo.server.settings import GROWTH_BYTES, PROCESS_BYTES
        from pipo.serving.allowance import asking_bytes
        from pipo.serving.wire import EngineSetup

        limits, trained = self._settings.limits, self._model.manifest.hyper.context_tokens
        growth = GROWTH_BYTES + limits.kept_bytes(self._config.context_tokens or trained)
        return EngineSetup(
            self._model.path,
            self._config,
            "server",
            asking_bytes(PROCESS_BYTES, growth),
            most_sequences=self._most_sequences,
        )

    def _say_ready(self, client: ServedEngine) -> None:
        from pipo.cli.session import model_title
        from pipo.cli.terminal import print_note, print_rows, stderr

        if not self._output.quiet:
            print_rows(stderr(), model_title(self._model), served_rows(client.info), style="dim")
            stderr().print()
        # said in any case: with --port 0 there is no other way to know
        print_note(f"serving {self._settings.name} at http://{self._settings.url_host}:{self._port}")


def served_rows(info: EngineInfo) -> Iterator[tuple[str, str]]:
    """What the engine's own process said of its plan."""
    told = cast("dict[str, Any]", info.plan)
    plan, prediction = told["plan"], told["prediction"]
    streamed, whole = plan["streamed_bytes_per_pass"], plan["weight_bytes"]
    what = f"{format_size(streamed)} of {format_size(whole)} stream from disk in every pass"
    yield "weights", what if streamed else f"all {format_size(whole)} stay in RAM"
    yield "memory", f"{format_size(plan['planned_bytes'])} planned, the limit is {format_size(info.limit_bytes)}"
    of_the_server = plan["breakdown_bytes"].get("server", 0)
    yield "", f"{format_size(of_the_server)} of it for the server's own process"
    yield "context", f"{info.context_tokens} tokens for each of {info.num_sequences} requests at a time"
    if prediction is not None:
        yield "expect", f"{prediction['tokens_per_s']:.3g} tokens/s; the limit is {prediction['limit']['text']}"
