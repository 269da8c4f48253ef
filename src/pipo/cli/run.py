"""`pipo run`: answer one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.errors import ContextOverflow, UsageError
from pipo.cli.constraint import ConstraintFlags
from pipo.cli.flags import (
    ComputeFlags,
    JsonFlag,
    MemoryFlags,
    ModelArgument,
    ModelFlag,
    OutputFlags,
    SamplingFlags,
    SystemFlag,
    make_config,
)
from pipo.cli.prompt import check_is_piped, check_not_empty, piped_prompt, sort_words

if TYPE_CHECKING:
    from pipo.cli.answer import Answer
    from pipo.cli.session import Session
    from pipo.generation.request import ConstraintSpec, Sampled, SamplingParams
    from pipo.model_file import ModelFile

DEFAULT_ANSWER_TOKENS = 256
MAX_LOGPROBS = 20  # of alternatives: each takes memory as long as the answer is kept


def run(
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="The prompt; read from a pipe otherwise.", show_default=False),
    ] = None,
    model_flag: ModelFlag = None,
    prompt_flag: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="PROMPT", help="The prompt, as a flag.")
    ] = None,
    system: SystemFlag = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without chat template.")] = False,
    json: JsonFlag = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With --json: log-probabilities, and the N likeliest.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what every worker did, for ui.perfetto.dev.")
    ] = None,
    expert_trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write which experts each token passed, for `pipo bench`.")
    ] = None,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
    sampling: SamplingFlags,
    constraint: ConstraintFlags,
) -> None:
    """Answer one prompt, within a memory budget.

    The prompt is put into the model's chat template, unless --raw.
    """
    name, text = sort_words([*([] if model is None else [model]), *(prompt or [])], model_flag, prompt_flag)
    if logprobs is not None and not json:
        raise UsageError("--logprobs needs --json", hint="text has no place for them")
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise UsageError(f"--logprobs {logprobs} is more than {MAX_LOGPROBS}", hint="as many as OpenAI's API gives")
    if system is not None and raw:
        raise UsageError("--system needs the chat template, which --raw leaves out")
    spec = constraint.spec()
    config = make_config(memory, compute, trace=trace is not None, constraints=spec is not None)
    sampling.params(sampling.max_tokens, logprobs)  # refuse bad values before anything is opened
    for flag, file in (("--trace", trace), ("--expert-trace", expert_trace)):
        if file is not None:
            _check_writable(flag, file)
    if text is None:
        check_is_piped()
    else:
        check_not_empty(text, is_raw=raw)

    from pipo.cli.session import open_model, open_session
    from pipo.generation.constraints import check_constraint
    from pipo.generation.request import logprobs_bytes
    from pipo.planner.predict import Workload

    if spec is not None:
        check_constraint(spec)
    opened = open_model(name, config.ram)
    if expert_trace is not None and not opened.manifest.hyper.num_experts:
        raise UsageError(f"--expert-trace {expert_trace}: {opened.manifest.name} has no experts", hint="leave it out")
    trained = opened.manifest.hyper.context_tokens
    longest = min(config.context_tokens or trained, trained)
    ids = _prompt_ids(opened, text, system, longest, is_raw=raw)
    del text  # of a long prompt, megabytes
    context, max_tokens = fit_answer(len(ids), sampling.max_tokens, config.context_tokens, trained)
    kept_bytes = 0 if logprobs is None else logprobs_bytes(max_tokens, logprobs)
    workload = Workload(len(ids), max_tokens)
    with open_session(opened, config, context, output, workload, kept_bytes) as session:
        with _noting_experts(session, opened, expert_trace):
            answer = _answer(session, ids, sampling.params(max_tokens, logprobs), spec, json=json)
        if trace is not None:
            session.engine.tracer.write_perfetto(trace)
        if json:
            _write_json(opened, session, answer, len(ids), has_logprobs=logprobs is not None)
        is_cut = answer.finish.value == "length"
        session.print_cost(*([_say_cut(len(answer.tokens), sampling.max_tokens, context)] if is_cut else []))


def _say_cut(num_tokens: int, wanted: int | None, context_tokens: int) -> str:
    if wanted is not None:
        return f"cut at {num_tokens} tokens by -n"
    if num_tokens == DEFAULT_ANSWER_TOKENS:
        return f"cut at {num_tokens} tokens: -n takes more"
    return f"cut at {num_tokens} tokens: the context of {context_tokens} is full"


def fit_answer(num_prompt: int, wanted: int | None, context: int | None, trained: int) -> tuple[int, int]:
    """The context to plan for and the tokens the answer may have.

    What was asked for is kept or refused; an answer length nobody asked for takes what is left, 256 at most.
    Raises ContextOverflow.
    """
    most = context or trained
    room = most - num_prompt
    if room < (wanted or 1):
        answer = f"{wanted} tokens of answer" if wanted else "any answer"
        whose = "the context of" if context else "the model's context of"
        fits = num_prompt + (wanted or DEFAULT_ANSWER_TOKENS) <= trained
        hint = f"-c {num_prompt + (wanted or DEFAULT_ANSWER_TOKENS)}" if fits else "a shorter prompt"
        hint += f", or -n {room} at most" if room > 0 else ""
        raise ContextOverflow(f"a prompt of {num_prompt} tokens and {answer} do not fit {whose} {most}", hint=hint)
    answer_tokens = wanted or min(DEFAULT_ANSWER_TOKENS, room)
    return context or num_prompt + answer_tokens, answer_tokens


def _prompt_ids(model: ModelFile, text: str | None, system: str | None, longest: int, *, is_raw: bool) -> list[int]:
    """Token ids of the prompt, piped in where `text` is None. Raises ContextOverflow: `longest` is in tokens."""
    if text is None:
        text = piped_prompt(model.most_bytes(longest))
        check_not_empty(text, is_raw=is_raw)
    return model.encode(text, longest) if is_raw else model.encode_chat(_messages(text, system), longest)


def _messages(text: str, system: str | None) -> list[dict[str, object]]:
    user: dict[str, object] = {"role": "user", "content": text}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _answer(
    session: Session, ids: list[int], params: SamplingParams, spec: ConstraintSpec | None, *, json: bool
) -> Answer:
    from pipo.cli.answer import stream_answer
    from pipo.cli.terminal import write_answer

    on_text = (lambda text: None) if json else write_answer
    answer = stream_answer(session.engine, ids, params, session.output, on_text, spec)
    if not json and not answer.text.endswith("\n"):
        write_answer("\n")
    return answer


def _write_json(model: ModelFile, session: Session, answer: Answer, num_prompt: int, has_logprobs: bool) -> None:
    from pipo.cli.report import report_dict
    from pipo.cli.terminal import write_json_object
    from pipo.plan_facts import plan_dict

    report = session.engine.report
    assert report is not None
    result: dict[str, object] = {
        "model": str(model.path),
        "text": answer.text,
        "finish_reason": answer.finish.value,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": len(answer.tokens),
            "cached_tokens": report.timing.cached_tokens,
        },
    }
    if has_logprobs:
        result["tokens"] = (_token_dict(model, token) for token in answer.tokens)
    result["plan"] = plan_dict(session.plan)
    result["cost"] = report_dict(session.plan, report)
    write_json_object(result)


def _token_dict(model: ModelFile, token: Sampled) -> dict[str, object]:
    def text(token_id: int) -> str:
        return model.tokenizer.token_bytes(token_id).decode(errors="replace")

    top = [{"id": token_id, "text": text(token_id), "logprob": logprob} for token_id, logprob in token.top]
    return {"id": token.token_id, "text": text(token.token_id), "logprob": token.logprob, "top": top}


@contextmanager
def _noting_experts(session: Session, model: ModelFile, file: Path | None) -> Iterator[None]:
    if file is None:
        yield
        return
    from pipo.models.stage import banks_of
    from pipo.pipeline.expert_trace import TraceHead, TraceWriter

    hyper = model.manifest.hyper
    head = TraceHead(model.manifest.name, len(banks_of(model.stages)), hyper.num_experts, hyper.num_experts_per_tok)
    with file.open("w", encoding="utf-8") as opened:
        session.engine.note_experts(TraceWriter(opened, head).note)
        yield


def _check_writable(flag: str, path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
