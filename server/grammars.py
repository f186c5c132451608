"""Keeps vLLM's engine alive where the form of an answer does not compile.

Some of vLLM's versions, 0.24 among them, look for a compiled grammar in their scheduler, where the
error of one that did not compile ends the engine, and with it all other requests.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

if TYPE_CHECKING:
    from torch import Tensor

_logger = init_logger("vllm.sliceserve")


class NoGrammar(StructuredOutputGrammar):  # type: ignore[misc]  # vLLM is untyped here
    """Takes no token, on which vLLM ends the request with an error."""

    def accept_tokens(self, _request_id: str, _tokens: list[int]) -> bool:
        """Accept none."""
        return False

    def validate_tokens(self, _tokens: list[int]) -> list[int]:
        """Return those that are accepted: none."""
        return []

    def rollback(self, num_tokens: int) -> None:
        """Do nothing: there is no state."""

    def fill_bitmask(self, bitmask: Tensor, batch_index: int) -> None:
        """Let the model choose any token, which is not accepted then."""
        bitmask[batch_index].fill_(-1)

    def is_terminated(self) -> bool:
        """Return False: it has not begun."""
        return False

    def reset(self) -> None:
        """Do nothing: there is no state."""


def guard_grammars() -> None:
    """Have a form that does not compile end its request only; safe to call more than once."""
    try:
        if _is_guarded():
            return
    except (AttributeError, TypeError) as error:
        _logger.warning("This vLLM is unknown: its engine may end with a grammar: %s", error)
        return
    create = StructuredOutputManager._create_grammar

    def create_or_refuse(manager: Any, request: Any) -> Any:
        try:
            return create(manager, request)
        except Exception as error:
            _logger.error("Request %s: its grammar does not compile: %s", request.request_id, error)
            return NoGrammar()

    StructuredOutputManager._create_grammar = create_or_refuse


def _is_guarded() -> bool:
    """Whether vLLM holds the error itself, or `guard_grammars` has been called."""
    if StructuredOutputManager._create_grammar.__module__ == __name__:
        return True
    failed: Future[Any] = Future()
    failed.set_exception(ValueError("no grammar"))
    request = StructuredOutputRequest(params=None)
    request.grammar = failed
    try:
        ready: bool = request.is_grammar_ready
    except ValueError:
        return False
    return ready
