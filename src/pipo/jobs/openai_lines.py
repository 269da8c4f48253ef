"""Lines of OpenAI's batch format: requests in, responses out.

Source: OpenAI's API reference, "The request input object" and "The request output object" of the Batch API.
`created` is 0: an output depends on the input, the model and the settings alone, never on when it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from pipo.base.errors import UsageError
from pipo.generation.request import ConstraintKind, ConstraintSpec, SamplingParams
from pipo.jobs.answers import Answer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_KEYS = ("custom_id", "method", "url", "body")
# name here: names there. What pipo adds to OpenAI's is called as llama.cpp's and vLLM's servers call it.
_PARAMS = {
    "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "repeat_penalty": "repeat_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "repeat_last_n": "repeat_last_n", "seed": "seed",
    "ignore_eos": "ignore_eos",
}  # fmt: skip
# about the account, the transport or the bill: no answer depends on them. The model is the one the job has.
_OF_NO_ANSWER = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_DEFAULTS: Mapping[str, tuple[object, ...]] = {  # what may be said, for it is what happens anyway
    "n": (1,), "best_of": (1,), "stream": (False,), "logprobs": (False,), "echo": (False,), "tools": ([],),
    "stream_options": (), "parallel_tool_calls": (True, False), "suffix": (),
}  # fmt: skip
_HANDLED = {"messages", "prompt", "stop", "logit_bias", "response_format"}


def is_openai_line(values: Mapping[str, object]) -> bool:
    return all(key in values for key in _KEYS)


def body_of(line: Mapping[str, object]) -> Mapping[str, object]:
    """Raises UsageError for another endpoint, or none."""
    if line["url"] not in (CHAT, COMPLETIONS) or line["method"] != "POST":
        raise UsageError(f"wanted POST {CHAT} or {COMPLETIONS}, found {line['method']} {line['url']!s:.100}")
    if not isinstance(line["custom_id"], str):
        raise UsageError(f"custom_id must be a text, found {line['custom_id']!r:.100}")
    body = line["body"]
    if not isinstance(body, dict):
        raise UsageError(f"body must be an object, found {body!r:.100}")
    wanted, other = ("messages", "prompt") if line["url"] == CHAT else ("prompt", "messages")
    if wanted not in body or other in body:
        raise UsageError(f"the body of {line['url']} has {wanted} and no {other}, found {', '.join(body):.200}")
    return body


def params_of(body: Mapping[str, object], given: SamplingParams) -> SamplingParams:
    """`given` with what the body says. Raises UsageError for a bad value, and for what no answer here would heed."""
    for name, value in body.items():
        if name in _PARAMS or name in _OF_NO_ANSWER or name in _HANDLED or value is None:
            continue
        if value not in _DEFAULTS.get(name, ()):
            raise UsageError(f"{name:.80} {value!r:.80} is not supported in a batch", hint="leave it out")
    changes = {ours: body[theirs] for theirs, ours in _PARAMS.items() if body.get(theirs) is not None}
    if body.get("stop") is not None:
        changes["stop"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    if body.get("logit_bias"):
        changes["logit_bias"] = _logit_bias(body["logit_bias"])
    make: Callable[..., SamplingParams] = replace  # which looks at every value
    return make(given, **changes)


def constraint_of(body: Mapping[str, object]) -> ConstraintSpec | None:
    """Of `response_format`. Raises UsageError."""
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return ConstraintSpec(ConstraintKind.JSON_OBJECT)
    named = wanted.get("json_schema") if isinstance(wanted, dict) and kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise UsageError(
            f"response_format must be text, json_object or json_schema with a schema, found {wanted!r:.100}"
        )
    return ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def response_line(answer: Answer, line: Mapping[str, object], model: str) -> str:
    """The output object of a request."""
    name = hashlib.blake2b(f"{answer.row} {line['custom_id']}".encode("utf-8", "replace"), digest_size=12).hexdigest()
    is_chat = line["url"] != COMPLETIONS
    body = _body(answer, model, f"{'chatcmpl' if is_chat else 'cmpl'}-{name}", is_chat=is_chat)
    response = {"status_code": 200 if answer.error is None else 400, "request_id": f"req_{name}", "body": body}
    found = {"id": f"batch_req_{name}", "custom_id": line["custom_id"], "response": response, "error": None}
    return json.dumps(found, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _body(answer: Answer, model: str, name: str, *, is_chat: bool) -> dict[str, object]:
    if answer.error is not None:
        kind = "invalid_request_error"
        return {"error": {"message": answer.error, "type": kind, "param": None, "code": answer.code}}
    content: dict[str, object] = (
        {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        if is_chat
        else {"text": answer.text}
    )
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": answer.finish_reason}
    prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    kind = "chat.completion" if is_chat else "text_completion"
    return {"id": name, "object": kind, "created": 0, "model": model, "choices": [choice], "usage": usage}


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise UsageError(f"logit_bias must map token ids to numbers, found {value!r:.100}")
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"logit_bias must map token ids to numbers, found {value!r:.100}") from error
