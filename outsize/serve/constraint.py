"""Answers that must be JSON of a given schema: which tokens may come next, by the library llguidance."""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from typing import Any

import torch

from outsize.errors import OptionError, OutsizeError, RunError

WRITTEN: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as Python's json.dumps
TOKEN_BYTES = 512  # what the library holds for each token of a vocabulary, at most
KEPT = 64  # schemas that stay compiled


def schemas_bytes(vocabulary: int) -> int:
    """What following schemas takes when somebody asks for it: nothing when the library is not installed."""
    return vocabulary * TOKEN_BYTES if importlib.util.find_spec("llguidance") is not None else 0


class JsonConstraint:
    """One answer on its way through a schema. `error` once the schema has turned out too complex to go on."""

    def __init__(self, matcher: Any, end_tokens: torch.Tensor) -> None:
        self._matcher, self._end_tokens = matcher, end_tokens
        self.error: OutsizeError | None = None

    def restrict(self, scores: torch.Tensor) -> None:
        """Rule out, in place, every token in `scores` [vocabulary] that cannot come next."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[
            : len(scores)
        ].bool()
        if self._matcher.is_accepting():
            allowed[self._end_tokens] = True
        if self._matcher.is_error() or not allowed.any():
            self.error = RunError(f"The JSON schema cannot be followed further. {self._matcher.get_error()}")
            return
        scores[: len(allowed)].masked_fill_(~allowed.to(scores.device), -torch.inf)
        scores[len(allowed) :] = -torch.inf

    def accept(self, token: int) -> bool:
        """Take a token that was allowed. True when the answer is complete."""
        return (
            bool((self._end_tokens == token).any())
            or not self._matcher.consume_token(token)
            or self._matcher.is_stopped()
        )


class Schemas:
    """Compiles schemas for a model's `tokenizer` and `vocabulary`, when the first is asked for. For several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._end_tokens = torch.tensor(sorted(end_tokens), dtype=torch.long)
        self._lock = threading.Lock()
        self._library: Any = None  # llguidance's view of the tokenizer
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def constraint(self, schema: str) -> JsonConstraint:
        """A constraint at the beginning of an answer, for a JSON schema as text.

        Raises OptionError for a schema that is none or has what llguidance cannot follow, when the model's tokenizer cannot
        be used, and when llguidance is not installed."""
        with self._lock:
            found = self._compiled.pop(schema, None)
        found = found if found is not None else self._compile(schema)
        with self._lock:
            self._compiled[schema] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return JsonConstraint(found.deep_copy(), self._end_tokens)

    def _compile(self, schema: str) -> Any:
        tokens = self._tokens()
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=WRITTEN)
        except ValueError as problem:
            raise OptionError(f"json_schema cannot be used: {problem}") from problem
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise OptionError(f"json_schema cannot be used: {matcher.get_error()}")
        return matcher

    def _tokens(self) -> Any:
        if self._library is None:
            try:
                from llguidance.hf import from_tokenizer
            except ImportError as problem:
                raise OptionError(
                    "json_schema needs llguidance. Install the extra where the model is served: "
                    "pip install 'outsize[structured]'."
                ) from problem
            end = int(self._end_tokens[0]) if len(self._end_tokens) else None
            try:
                self._library = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=end)
            except Exception as problem:  # whatever a tokenizer that it does not know makes it raise
                raise OptionError(f"json_schema cannot be used with this model's tokenizer: {problem}") from problem
        return self._library
