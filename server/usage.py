"""The tokens that an HTTP request costs the engine, whatever its route and however it ends.

Not all of vLLM's routes tell, and none does of an answer that was left; its engine knows.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Scope

_SCOPE_KEY = "sliceserve.work"


@dataclass
class Work:
    """The sequences that the engine computes for one request: vLLM's ``RequestState`` by id."""

    sequences: dict[str, Any] = field(default_factory=dict)

    def tokens(self) -> tuple[int, int] | None:
        """Return the tokens of prompts, once for all answers to one, and those generated so far.

        None if the engine was not asked, or keeps no statistics.
        """
        sequences = self.sequences.values()
        if not sequences or any(one.stats is None for one in sequences):
            return None
        return (
            sum(one.prompt_len for one in sequences if not one.request_index),
            sum(one.stats.num_generation_tokens for one in sequences),
        )


# vLLM's routes do not tell its engine which HTTP request they ask for; tasks inherit this.
_work: ContextVar[Work | None] = ContextVar("sliceserve.work", default=None)


@contextmanager
def working(scope: Scope) -> Iterator[None]:
    """Count what the engine is asked for within the block as the cost of an HTTP request."""
    scope[_SCOPE_KEY] = work = Work()
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)


def work_of(scope: Scope) -> Work:
    """Return what a request has cost so far."""
    found: Work = scope.get(_SCOPE_KEY) or Work()
    return found


def watch_sequences(output_processor: Any) -> None:
    """Have vLLM's ``OutputProcessor`` count what it begins for the request that asks."""
    add_request = output_processor.add_request

    def add_and_note(request: Any, *arguments: Any, **options: Any) -> None:
        add_request(request, *arguments, **options)
        name = request.request_id
        sequence = output_processor.request_states.get(name)
        if (work := _work.get()) is not None and sequence is not None:
            work.sequences[name] = sequence

    output_processor.add_request = add_and_note
