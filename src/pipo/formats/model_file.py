"""Open a model file for reading, and say what a file is when it is not the one we hoped for."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from pipo.base.errors import FileChanged, MalformedFile, ModelError, ModelNotFound, UnsupportedModel
from pipo.base.file_identity import FileIdentity

DOWNLOAD_AGAIN = "the download went wrong: fetch the file again"
PICKLES_HINT = "pickled weights are never read: download the model's .safetensors files, or a GGUF of it"
_WHAT_WORKS = "pipo reads GGUF files, and Hugging Face folders with safetensors"
_CONVERT = f"{_WHAT_WORKS}; convert the model with llama.cpp's convert_hf_to_gguf.py, or download a GGUF of it"

# How another kind of file begins. The first two columns are its first bytes and its name.
_PICKLES = (
    (b"PK\x03\x04", "a zip archive (PyTorch saves .bin, .pt and .pth this way)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
)
_UNSUPPORTED = (
    (b"tjgg", "a GGJT file, the predecessor of GGUF"),
    (b"fmgg", "a GGMF file, a predecessor of GGUF"),
    (b"lmgg", "a GGML file, a predecessor of GGUF"),
    (b"FUGG", "a GGUF file with its bytes swapped"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
)
_BROKEN_DOWNLOADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
)


def open_model_file(path: Path) -> FileIO:
    """Open for unbuffered reading. Raises ModelNotFound or UnsupportedModel; never blocks on a pipe or device."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ModelNotFound(f"{path}: cannot be opened: {error}") from error
    if stat.S_ISDIR(mode):
        raise refuse_folder(path)
    raise UnsupportedModel(f"{path}: is not a regular file", hint=_WHAT_WORKS)


def refuse_folder(path: Path) -> ModelError:
    """The error for a folder that holds no model of Hugging Face's."""
    return UnsupportedModel(f"{path}: is a folder without a model's config.json", hint=folder_hint(path))


def refuse_not_gguf(path: Path, head: bytes) -> ModelError:
    """The error for a file whose first bytes, `head` (16 or more where the file has them), are not GGUF's."""
    stranger = refuse_stranger(path, head)
    if stranger is not None:
        return stranger
    if _looks_like_safetensors(head):
        return UnsupportedModel(
            f"{path}: is a safetensors file without a model's config.json beside it",
            hint="name the folder of a whole model",
        )
    return MalformedFile(f"{path}: is not a GGUF file: wanted the magic b'GGUF', found {head[:4]!r}", hint=_WHAT_WORKS)


def refuse_stranger(path: Path, head: bytes) -> ModelError | None:
    """The error for a file that begins as one pipo never reads, pickles among them; None for any other."""
    if not head:
        return MalformedFile(f"{path}: is empty", hint=DOWNLOAD_AGAIN)
    if _looks_like_safetensors(head):  # first: its length may begin as a pickle does
        return None
    for start, what in _BROKEN_DOWNLOADS:
        if head.startswith(start):
            return MalformedFile(f"{path}: is {what}", hint=DOWNLOAD_AGAIN)
    for start, what in _PICKLES:
        if head.startswith(start):
            return UnsupportedModel(f"{path}: is {what}", hint=PICKLES_HINT)
    for start, what in _UNSUPPORTED:
        if head.startswith(start):
            return UnsupportedModel(f"{path}: is {what}", hint=_CONVERT)
    return None


def is_there(look: Callable[[], bool]) -> bool:
    """What a path's `is_dir`, `is_file` or `exists` says; False where the system refuses to look, for whoever opens it
    says why.
    """
    try:
        return look()
    except OSError:
        return False


def check_unchanged(path: Path, file: FileIO, identity: FileIdentity, *, offset: int, num_bytes: int) -> None:
    """Raises FileChanged when `file` is not the one `identity` was taken from."""
    if FileIdentity.of(os.fstat(file.fileno())) != identity:
        raise FileChanged(
            "the file changed since it was opened",
            path=str(path),
            offset=offset,
            wanted_bytes=num_bytes,
            got_bytes=0,
            hint="wait until the download is complete, then start again",
        )


def _looks_like_safetensors(head: bytes) -> bool:
    # Eight bytes of header length, then the header: a JSON object.
    return len(head) >= 10 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 32


def folder_hint(path: Path) -> str:
    """What to name instead of a folder that is no model."""
    inside = sorted(p.name for p in path.glob("*.gguf"))
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"name a file in it: {', '.join(inside[:3])}{more}"
    return f"{_WHAT_WORKS}"
