"""The tokens that an HTTP request costs the engine, whatever its route and however it ends.

Not all of vLLM's routes tell, and none does of an answer that was left; its engine knows.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

_SCOPE_KEY = "sliceserve.work"
BEAM = "-beam-"


@dataclass
class Work:
    """The sequences that the engine computes for one request.

    Attributes:
        prompt_tokens: once for all answers to a prompt, and for all beams of a search.
        stats: vLLM's ``RequestStateStats`` of each sequence, by its id; None if it keeps none.

    """

    prompt_tokens: int = 0
    stats: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, sequence: Any) -> None:
        """Count vLLM's ``RequestState``, of an id that may come again."""
        if name in self.stats:
            return
        # A beam search begins a sequence anew for every token of every beam.
        again = BEAM in name and any(BEAM in other for other in self.stats)
        if not sequence.request_index and not again:
            self.prompt_tokens += sequence.prompt_len
        self.stats[name] = sequence.stats

    def tokens(self) -> tuple[int, int] | None:
        """Return the tokens of prompts, and those generated so far.

        None if the engine was not asked, or keeps no statistics.
        """
        stats = self.stats.values()
        if not stats or any(one is None for one in stats):
            return None
        return self.prompt_tokens, sum(one.num_generation_tokens for one in stats)


# vLLM's routes do not tell its engine which HTTP request they ask for; tasks inherit this.
_work: ContextVar[Work | None] = ContextVar("sliceserve.work", default=None)


def begin_work(scope: Scope) -> Token[Work | None]:
    """Count what the engine is asked for as the cost of an HTTP request, until `end_work`."""
    scope[_SCOPE_KEY] = work = Work()
    return _work.set(work)


def end_work(token: Token[Work | None]) -> None:
    """Count no longer what `begin_work`, which gave this, has begun to count."""
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
            work.add(name, sequence)

    output_processor.add_request = add_and_note
