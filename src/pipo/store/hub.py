"""The Hugging Face hub: what a repository holds, and where its files are fetched from.

Asks through huggingface-hub, which is imported when the first question is asked; it knows tokens, proxies and the hub's
own errors. Bytes are fetched by `store.fetch`, which resumes and compares. Threads: any.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from pipo.base.errors import DownloadError, ModelNotFound, PipoError, UsageError
from pipo.store.hub_cache import COMMIT
from pipo.store.hub_files import RepoFile, is_plain
from pipo.store.hub_name import is_repo
from pipo.store.library import Expected
from pipo.store.request import Address, NoAccess, asked_wait_s

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface-hub reads its variables
_TOKEN = re.compile(r"[\x21-\x7e]+")
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 15.0
_NUM_TRIES = 3  # of a question, where the hub fails or is silent
_WAIT_S = 1.0
_RESETS_IN = re.compile(r"\bt=(\d{1,6})\b")  # of the header RateLimit
_SETTINGS = "HF_TOKEN names a token, made at {}/settings/tokens"


@dataclass(frozen=True, slots=True)
class HubFile(RepoFile):
    """A file that the hub has. `etag` names its bytes, and its place in the cache."""

    etag: str
    expected: Expected


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at one commit. `repo` is spelled as the hub spells it."""

    hub: Hub
    repo: str
    revision: str
    is_gated: bool
    files: tuple[HubFile, ...]

    def address_of(self, file: HubFile) -> Address:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo, file.path, revision=self.revision, endpoint=self.hub.endpoint)
        return Address(url, self.hub.token)

    def explain(self, error: NoAccess) -> DownloadError:
        """What a refused file means, and what to do."""
        if error.status not in (401, 403):
            return error
        return _no_access(self.hub, self.repo, error.status, is_gated=self.is_gated)


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub is and who asks it."""

    endpoint: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Hub:
        """HF_ENDPOINT; HF_TOKEN, or what `hf auth login` keeps. Raises UsageError, DownloadError (HF_HUB_OFFLINE)."""
        if is_offline():
            raise DownloadError(
                "HF_HUB_OFFLINE is set: the hub is not asked", hint="unset it to fetch; what was pulled runs with it"
            )
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if not _is_address(endpoint):
            raise UsageError("HF_ENDPOINT is not an address", hint="it begins with https://, as in " + DEFAULT_ENDPOINT)
        return cls(endpoint, _find_token())

    @property
    def shown(self) -> str:
        return str(Address(self.endpoint))

    def look_up(self, repo: str) -> HubRepo:
        """What is in the newest commit. Raises ModelNotFound, DownloadError, NoAccess."""
        info = self._ask(repo)
        spelled, revision = str(info.id), str(info.sha)
        if not is_repo(spelled) or not COMMIT.fullmatch(revision):
            raise DownloadError(f"{self.shown} gives {repo} the name {spelled!r:.80} at commit {revision!r:.80}")
        siblings = [
            each for each in info.siblings or () if isinstance(each.rfilename, str) and is_plain(each.rfilename)
        ]
        return HubRepo(self, spelled, revision, bool(info.gated), tuple(_file(spelled, each) for each in siblings))

    def _ask(self, repo: str) -> ModelInfo:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(self.endpoint, token=self.token or False, library_name="pipo", library_version=_version())
        # the base of what its HTTP library raises; which library that is depends on its version
        http_error = cast("type[Exception]", next(t for t in HfHubHTTPError.__mro__ if t.__name__ == "HTTPError"))
        for num_failures in range(1, _NUM_TRIES + 1):
            try:
                return api.model_info(repo, files_metadata=True, timeout=_TIMEOUT_S)
            except HfHubHTTPError as error:
                failure = _explained(self, repo, error)
                is_lasting = error.response.status_code < 500
            except http_error as error:
                failure, is_lasting = _unreachable(self, error), False
            except ImportError as error:  # of what speaks with a proxy
                hint = "install what it names, or unset the variable of the proxy"
                raise DownloadError(f"{self.shown} cannot be asked through this proxy: {error}", hint=hint) from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # an answer that is no such JSON
                failure, is_lasting = _not_a_hub(self, error), True
            if is_lasting or num_failures == _NUM_TRIES:
                raise failure
            time.sleep(_WAIT_S * num_failures)
        raise AssertionError("a question has at least one try")


def _version() -> str:
    """Told to the hub."""
    try:
        return version("pipo")
    except PackageNotFoundError:  # run from a source tree
        return "0"


def is_offline() -> bool:
    values = (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper()
    return values in _TRUE


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # a port that is no number
        return False


def _find_token() -> str | None:
    """Raises UsageError, which does not show it, for what no header can hold."""
    from huggingface_hub import get_token

    if (os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN") or "").upper() in _TRUE:
        return None
    token = get_token()
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "the Hugging Face token has characters that no token has",
            hint="look at HF_TOKEN, or run `hf auth login` again",
        )
    return token


def _file(repo: str, sibling: RepoSibling) -> HubFile:
    """Raises DownloadError for what could not be compared when it came."""
    num_bytes, etag = sibling.size, sibling.blob_id
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
    if sibling.lfs is not None:
        num_bytes, etag = sibling.lfs.size, sha256
    is_named = isinstance(etag, str) and (_SHA256 if sha256 else _GIT_SHA1).fullmatch(etag)
    if not isinstance(etag, str) or not is_named or type(num_bytes) is not int or num_bytes < 0:
        raise DownloadError(
            f"the hub gives no size and hash of {repo}/{sibling.rfilename}: found {num_bytes!r:.80} and {etag!r:.80}",
            hint="look at HF_ENDPOINT: a mirror may leave them out",
        )
    return HubFile(sibling.rfilename, num_bytes, etag, Expected(num_bytes, sha256, "" if sha256 else etag))


def _explained(hub: Hub, repo: str, error: HfHubHTTPError) -> PipoError:
    """What the hub's refusal means. Without the error's own text, which is long and names no remedy of ours."""
    status, headers = error.response.status_code, error.response.headers
    code = headers.get("X-Error-Code")
    if status == 429:
        wait_s = asked_wait_s(headers.get("Retry-After")) or _reset_s(headers.get("RateLimit"))
        when = f"in {wait_s:.0f} s" if wait_s else "in some minutes"
        more = "" if hub.token else "; with HF_TOKEN more is allowed"
        return DownloadError(f"{hub.shown} was asked too often (HTTP 429)", hint=f"try again {when}{more}")
    if status == 401 and "credentials" in (headers.get("X-Error-Message") or ""):
        return DownloadError(f"{hub.shown} does not know the token (HTTP 401)", hint=_SETTINGS.format(hub.shown))
    if code == "GatedRepo":
        return _no_access(hub, repo, status, is_gated=True)
    if code in ("RepoNotFound", "RevisionNotFound") or status in (401, 404):
        is_private = "" if hub.token else f"; for a private one {_SETTINGS.format(hub.shown)}"
        return ModelNotFound(
            f"{hub.shown} has no {repo}, or does not show it (HTTP {status})", hint=f"look at the spelling{is_private}"
        )
    if status == 403:
        return _no_access(hub, repo, status, is_gated=False)
    hint = "it is the server's fault: try again later" if status >= 500 else "look at HF_ENDPOINT"
    return DownloadError(f"{hub.shown} answers HTTP {status} when asked for {repo}", hint=hint)


def _no_access(hub: Hub, repo: str, status: int | None, *, is_gated: bool) -> NoAccess:
    if is_gated:
        hint = f"accept its terms at {hub.shown}/{repo}; {_SETTINGS.format(hub.shown)}"
        return NoAccess(f"{repo} is gated: its files are for those who accepted its terms (HTTP {status})", hint=hint)
    hint = "the token may not read this repository" if hub.token else _SETTINGS.format(hub.shown)
    return NoAccess(f"{hub.shown} does not give out {repo} (HTTP {status})", hint=hint)


def _reset_s(ratelimit: str | None) -> float:
    found = _RESETS_IN.search(ratelimit or "")
    return float(found[1]) if found else 0.0


def _unreachable(hub: Hub, error: Exception) -> DownloadError:
    reason = str(error).strip() or type(error).__name__
    made = DownloadError(
        f"{hub.shown} cannot be reached: {reason:.200}",
        hint="look at the network and at HF_ENDPOINT; what was pulled runs without it",
    )
    made.__cause__ = error
    return made


def _not_a_hub(hub: Hub, error: Exception) -> DownloadError:
    made = DownloadError(f"{hub.shown} does not answer as a hub does: {error!r:.200}", hint="look at HF_ENDPOINT")
    made.__cause__ = error
    return made
