"""Answers that follow a JSON schema, a regex or a grammar: which tokens may come next. llguidance does the work.

A `Grammars` is made once a model, a `Constraint` once an answer. They know neither engine nor sampler: before each
token `apply` the constraint to the logits, then let it `take` what was chosen, and end the answer once it
`is_finished`. Measured: a mask takes 3 to 100 µs, 3 ms at worst for 150k tokens, and leaves the interpreter to other
threads meanwhile; eight of them on threads of their own were no faster than one after the other.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipo.base.errors import ComputeError, UsageError
from pipo.base.units import MIB
from pipo.generation.grammar_text import grammar_of, name_of, refuse
from pipo.generation.grammar_tokens import GrammarTokenizer, GrammarTokens, grammar_tokens_bytes
from pipo.generation.request import ConstraintKind, ConstraintSpec
from pipo.generation.sampling import NOTHING_FOLLOWS
from pipo.hardware.memory import release_free_memory

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

Floats = npt.NDArray[np.float32]

# The most that hostile texts took (tests/system/test_constraint_memory.py): one is made at a time, each keeps its own
MAKING_BYTES = 12 * MIB
KEPT_BYTES = 14 * MIB
MOST_AT_A_TIME = 8  # of the answers of an engine: others wait for their turn
NO_TEXT = "no text that the model can write follows it"
_MAX_SAID_CHARS = 300  # of what llguidance says


class Grammars:
    """Makes the constraints of one model. Threads: any.

    Raises UsageError where the model has no end token.
    """

    def __init__(self, tokenizer: GrammarTokenizer, num_rows: int) -> None:
        self._tokens = GrammarTokens(tokenizer, num_rows)
        self._limits = _limits()
        self._lock = threading.Lock()  # one is made at a time, so that the memory that takes is bounded

    def constraint(self, spec: ConstraintSpec) -> Constraint:
        """For one answer. Cost: 1 ms for a usual schema, 0.3 s for the worst; the interpreter is free meanwhile.

        Raises UsageError for a text that is none of its kind, that asks for what llguidance cannot do, or too much.
        """
        with self._lock:
            return Constraint(self._tokens, self._matcher(spec), spec)

    def _matcher(self, spec: ConstraintSpec) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens.library, grammar_of(spec), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what cannot even begin is refused here, before any work
        if matcher.is_error():
            refuse(spec.kind, _said(matcher.get_error()), _hint(spec.kind))
        return matcher


def check_constraint(spec: ConstraintSpec) -> None:
    """What can be said of it without a model, before one is opened. Raises UsageError as `Grammars.constraint`."""
    from llguidance import LLMatcher

    is_error, found = LLMatcher.validate_grammar_with_warnings(grammar_of(spec), limits=_limits())
    release_free_memory()
    if is_error:
        refuse(spec.kind, _said(found[0]), _hint(spec.kind))


def grammars_bytes(tokenizer: GrammarTokenizer, num_rows: int, num_sequences: int) -> int:
    """Memory for constraints of an engine with so many sequences, to be charged before there is a Grammars."""
    kept_bytes = min(num_sequences, MOST_AT_A_TIME) * KEPT_BYTES
    return grammar_tokens_bytes(tokenizer, num_rows) + MAKING_BYTES + kept_bytes


class Constraint:
    """What one answer may go on with. Threads: one at a time.

    With `after` in its spec everything may come before that text but an end; the constraint holds from there on.
    """

    def __init__(self, tokens: GrammarTokens, matcher: LLMatcher, spec: ConstraintSpec) -> None:
        self._tokens = tokens
        self._matcher = matcher
        self._kind = spec.kind
        self._mask = np.zeros((1, -(-tokens.num_rows // 32)), np.int32)  # a bit a token
        self._is_prepared = False
        self._awaited = spec.after.encode()
        self._seen = b""  # the last bytes before what is awaited

    @property
    def is_finished(self) -> bool:
        """Nothing can follow: the answer is whole."""
        return not self._awaited and self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_whole(self) -> bool:
        """The answer would be right if it ended here; more may follow."""
        return not self._awaited and self._matcher.is_accepting()

    def prepare(self) -> None:
        """Find what may come next, which `apply` does otherwise. Raises as `apply`."""
        from llguidance.numpy import fill_next_token_bitmask

        if not self._is_prepared:
            fill_next_token_bitmask(self._matcher, self._mask)
            self._check()
            self._is_prepared = True

    def apply(self, logits: Floats, *, goes_on: bool = False) -> Floats:
        """A copy with -inf for what must not come next. End tokens are allowed exactly where the answer is whole; with
        `goes_on` only where nothing else is.

        Shapes: logits (vocabulary). Raises UsageError where the grammar has become too much to follow.
        """
        if self._awaited:
            scores = logits.copy()
            scores[self._tokens.end_ids] = -np.inf
            return scores
        allowed = self._allowed(len(logits))
        scores = np.where(allowed, logits, np.float32(-np.inf))
        if goes_on and allowed.sum() > allowed[self._tokens.end_ids].sum():
            scores[self._tokens.end_ids] = -np.inf
        return scores

    def take(self, token_id: int) -> None:
        """A token that was chosen, no end token. Raises UsageError as `apply`, ComputeError where it was forbidden."""
        if self._awaited:
            self._wait(token_id)
            return
        self._is_prepared = False
        if not self._allows(token_id):
            raise ComputeError(f"token {token_id} was chosen against the {name_of(self._kind)}")
        if not self._matcher.consume_token(token_id):
            self._check()

    def _wait(self, token_id: int) -> None:
        """What a token has behind the awaited text is white space at most, in any tokenizer of ours: it is let go."""
        self._seen += self._tokens.token_bytes(token_id)
        if self._awaited in self._seen:
            self._awaited = b""
        self._seen = self._seen[-len(self._awaited) :]

    def _allowed(self, num_logits: int) -> npt.NDArray[np.bool_]:
        self.prepare()
        bits = np.unpackbits(self._mask.view(np.uint8).reshape(-1), count=num_logits, bitorder="little")
        return bits.view(np.bool_)

    def _allows(self, token_id: int) -> bool:
        """By the last mask."""
        return bool(self._mask[0, token_id // 32] >> (token_id % 32) & 1)

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        said = _said(self._matcher.get_error())
        # where the vocabulary lacks a byte that must come, llguidance allows other tokens, and refuses them when taken
        if "doesn't satisfy the grammar" in said or said == NO_TEXT:
            raise UsageError(NOTHING_FOLLOWS, hint="a constraint of what the model can write")
        raise UsageError(
            f"the {name_of(self._kind)} became too much to follow: {said}",
            hint="one with fewer alternatives, or with bounded repetitions",
        )


def _limits() -> LLParserLimits:
    """A tenth of llguidance's own: of its lexer 1 KB a state, and what making it takes grows with the fuel."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=100_000,
        step_lexer_fuel=50_000,
        step_max_items=5_000,
        max_lexer_states=8_000,
        max_grammar_size=60_000,
        verbose_errors=False,
    )


_SHOWN_PLACE = re.compile(r"\d* *\|.*|<.*>|\^")  # a line of a grammar, which the user may not have written


def _said(words: str) -> str:
    """llguidance's own words, on one line."""
    lines = [line.strip() for line in words.partition("<backtrace>")[0].splitlines()]
    kept = " ".join(line for line in lines if line and not _SHOWN_PLACE.fullmatch(line))
    if not kept or kept.startswith("NoExtension"):
        return NO_TEXT
    return kept[:_MAX_SAID_CHARS]


def _hint(kind: ConstraintKind) -> str | None:
    if kind is ConstraintKind.REGEX:
        return "regexes are those of Rust's regex crate: no look-around, no back-references"
    if kind is ConstraintKind.GRAMMAR:
        return "grammars are those of Lark, as llguidance reads them"
    return None
