"""How a server is set up: where it listens, who may ask, and how much anybody may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from pipo.base.errors import UsageError
from pipo.base.units import KIB, MIB

BODY_BYTES_PER_TOKEN = 16  # of context: a token of English is 4 bytes, JSON may write each of them as 6
LEAST_BODY_BYTES = 256 * KIB  # schemas and tools are text that no context counts
BODIES_READ = 8  # of the largest size, that arrive or wait for their turn; smaller ones are more
PROCESS_BYTES = 60 * MIB  # anonymous memory of a serving process with a tokenizer of 49k tokens; 57 measured
GROWTH_BYTES = 16 * MIB  # more of it after requests of every kind; 14 measured
BODY_COPIES = 26  # what a body takes at most while its turn lasts, in its own size: 25 measured, of tiny messages
MOST_CONNECTIONS = 256  # open at a time, whatever they say or do not say
CONNECTION_BYTES = 8 * KIB  # of each, besides its head; 7 measured
_SECONDS = {
    "max_request_s": "--max-request-time",
    "read_timeout_s": "--read-timeout",
    "write_timeout_s": "--write-timeout",
    "ping_s": "--ping-interval",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, one client and all of them may take. Bytes, tokens and seconds; None: the context's."""

    max_body_bytes: int | None = None
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None  # of an answer
    max_requests: int = 64  # at a time
    max_choices: int = 16  # answers that one request may ask for: prompts times `n`
    max_request_s: float = 3600.0  # at 0.2 tokens/s, 700 tokens
    max_header_bytes: int = 16 * KIB
    read_timeout_s: float = 30.0  # for the whole of a request to arrive
    write_timeout_s: float = 30.0  # of a client that does not read
    ping_s: float = 15.0  # between signs of life on a stream
    max_logprob_bytes: int = 8 * MIB  # log-probabilities kept until an answer is whole

    def __post_init__(self) -> None:
        for name, flag in _SECONDS.items():
            if not 0 < getattr(self, name) < 1e9:
                raise UsageError(f"{flag} must be more than 0 seconds, not {getattr(self, name):g}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Limits:
        """None: the default. Raises UsageError."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def body_bytes(self, context_tokens: int) -> int:
        """The largest body that is read."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return LEAST_BODY_BYTES + BODY_BYTES_PER_TOKEN * context_tokens

    def kept_bytes(self, context_tokens: int) -> int:
        """What requests take at most, besides the process as it is without any."""
        connections = MOST_CONNECTIONS * (CONNECTION_BYTES + self.max_header_bytes)
        return (BODIES_READ + BODY_COPIES) * self.body_bytes(context_tokens) + self.max_logprob_bytes + connections


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`name` is what requests call the model. `cors_origins` are those of pages that may ask; "*" is any."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} is none", hint="0 to 65535; 0 takes one that is free")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("--api-key must be printable ASCII and not empty", hint="clients send it as a header")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.endswith("/")):
                raise UsageError(f"--cors-origin {origin!r:.80} is no origin", hint="https://example.org, or *")

    @property
    def is_loopback(self) -> bool:
        """Only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """What the Host header may name, without port; None for anything. A page elsewhere whose name is made to
        resolve to 127.0.0.1 has its own name there.
        """
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.url_host}) if self.is_loopback else None

    @property
    def url_host(self) -> str:
        return f"[{self.host.strip('[]')}]" if ":" in self.host else self.host
