"""What a client is told: one kind of error, written in the shape of the API that was asked.

Source: OpenAI's and Anthropic's API references, "Errors".
"""

from __future__ import annotations

import logging
import traceback
from enum import Enum

from pipo.base.errors import (
    Cancelled,
    ContextOverflow,
    EngineBusy,
    EngineDied,
    MalformedFile,
    OverBudget,
    PipoError,
    UsageError,
)

_log = logging.getLogger(__name__)
RETRY_S = 1  # what a client that came too early is told to wait


class Fault(Enum):
    """HTTP status, OpenAI's type, Anthropic's type."""

    INVALID = (400, "invalid_request_error", "invalid_request_error")
    UNAUTHORISED = (401, "authentication_error", "authentication_error")
    FORBIDDEN = (403, "permission_error", "permission_error")
    NOT_FOUND = (404, "not_found_error", "not_found_error")
    WRONG_METHOD = (405, "invalid_request_error", "invalid_request_error")
    TOO_SLOW = (408, "timeout_error", "timeout_error")
    TOO_LARGE = (413, "invalid_request_error", "request_too_large")
    HEAD_TOO_LARGE = (431, "invalid_request_error", "request_too_large")
    TOO_MANY = (429, "rate_limit_error", "rate_limit_error")
    BROKEN = (500, "server_error", "api_error")
    UNAVAILABLE = (503, "unavailable_error", "overloaded_error")
    OUT_OF_TIME = (504, "timeout_error", "timeout_error")

    @property
    def status(self) -> int:
        return self.value[0]


class ApiError(Exception):
    """`param` is the field that is at fault, `code` a word for programs; `retry_s` where trying again may help."""

    def __init__(
        self,
        fault: Fault,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.param = param
        self.code = code
        self.retry_s = RETRY_S if retry_s is None and fault in _LATER else retry_s

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_s is None else {"retry-after": str(self.retry_s)}


_LATER = {Fault.TOO_MANY, Fault.UNAVAILABLE}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(Fault.INVALID, message, param=param, code=code)


def openai_error(error: ApiError) -> dict[str, object]:
    body = {"message": error.message, "type": error.fault.value[1], "param": error.param, "code": error.code}
    return {"error": body}


def anthropic_error(error: ApiError) -> dict[str, object]:
    return {"type": "error", "error": {"type": error.fault.value[2], "message": error.message}}


def api_error_of(error: Exception) -> ApiError:
    """What a client hears of an error of ours. Paths and tracebacks stay here, in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflow):
        return invalid(error.message, code="context_length_exceeded")
    if isinstance(error, OverBudget):
        return invalid(f"this request does not fit the memory budget: {error.message}", code="over_budget")
    if isinstance(error, UsageError | MalformedFile):  # of a request, the template's refusal
        return invalid(error.message)
    if isinstance(error, EngineBusy):
        return ApiError(Fault.UNAVAILABLE, error.message, code="busy")
    if isinstance(error, Cancelled):
        return stopping()
    what = type(error).__name__
    if isinstance(error, EngineDied):
        return engine_gone(error)
    if isinstance(error, PipoError):
        _log.error("engine_failed=%s: %s", what, error.message)
        return ApiError(Fault.BROKEN, f"the engine failed ({what}); the server's log says more")
    _log.error("bug=%s\n%s", what, "".join(traceback.format_exception(error)))
    return ApiError(Fault.BROKEN, f"the server has a bug ({what}); its log says more")


def engine_gone(error: PipoError) -> ApiError:
    """Nobody is asked to try again: the server ends, too."""
    return ApiError(Fault.BROKEN, f"{error.message}; this server ends with it", code="engine_died")


def stopping() -> ApiError:
    return ApiError(Fault.UNAVAILABLE, "the server is shutting down", code="shutting_down")
