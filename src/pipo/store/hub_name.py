"""What a model of the Hugging Face hub is called: `org/name`, or `org/name:quant`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_MAX_REPO_CHARS = 96  # the hub's own limit
_MAX_QUANT_CHARS = 200
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class HubName:
    """`quant` is what tells the files of a repository apart: a quantisation, or a file's name. None: the usual one."""

    repo: str
    quant: str | None = None

    def __str__(self) -> str:
        return self.repo if self.quant is None else f"{self.repo}:{self.quant}"

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None for what is no such name. A text of one slash that ends as model files do is a path."""
        repo, colon, quant = text.partition(":")
        if not is_repo(repo) or (colon and not _is_quant(quant)):
            return None
        if not colon and repo.lower().endswith(_FILE_SUFFIXES):
            return None
        return cls(repo, quant if colon else None)


def is_repo(text: str) -> bool:
    """Whether the hub could have a repository of this name."""
    owner, slash, name = text.partition("/")
    if not slash or len(text) > _MAX_REPO_CHARS or "--" in text or ".." in text:
        return False
    return all(_PART.fullmatch(part) is not None for part in (owner, name))


def _is_quant(text: str) -> bool:
    return 0 < len(text) <= _MAX_QUANT_CHARS and text.isprintable()
