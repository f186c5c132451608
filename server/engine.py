"""vLLM's engine, with what our layers ask of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from sliceserve.server.usage import watch_sequences

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator

    from sliceserve.server.live import LiveFigures
    from sliceserve.server.metrics import ServerMetrics
    from sliceserve.server.queued import TokenQueue


# Seconds within which an engine that dies is found out by who waits for its answer.
DEATH_INTERVAL_S = 0.5


class NoRoomError(VLLMValidationError):  # type: ignore[misc]
    """The queue has no room; of a kind that vLLM's routes answer without a word in the log."""


class Engine(AsyncLLM):  # type: ignore[misc]
    """vLLM's engine, with a question that only a running one answers and a bound on its queue.

    Attributes:
        queue: refuses prompts that have no room; None lets everything in.

    """

    queue: TokenQueue | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        """Begin as vLLM's engine, and count what each HTTP request costs."""
        super().__init__(*args, **options)
        watch_sequences(self.output_processor)

    async def answer(self) -> None:
        """Return once the engine's loop has answered; raises if it is dead.

        The loop answers between two steps of the model, so a step that hangs is noticed.
        """
        question = asyncio.ensure_future(self.is_sleeping())
        try:
            # Of an engine that dies meanwhile the question would never have an answer.
            while not question.done():
                await self.check_health()
                await asyncio.wait([question], timeout=DEATH_INTERVAL_S)
        finally:
            question.cancel()
        await question

    def queued_tokens(self) -> int:
        """Return the tokens of prompts, one for each answer, that have no first token yet."""
        states = self.output_processor.request_states.values()
        return sum(state.prompt_len for state in states if state.is_prefilling)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Return vLLM's outputs; raises NoRoomError at once, not when they are asked for."""
        tokens = prompt_tokens(prompt) * sampling_params.n
        if self.queue is not None and not self.queue.take(request_id, tokens):
            raise NoRoomError("There is no room for the prompt.")
        outputs: AsyncGenerator[Any, None] = super().generate(
            prompt, sampling_params, request_id, **options
        )
        return outputs

    async def add_request(self, request_id: str, *args: Any, **options: Any) -> Any:
        """Add a request as vLLM does; from then on it is one of `queued_tokens`."""
        try:
            return await super().add_request(request_id, *args, **options)
        finally:
            if self.queue is not None:
                self.queue.settle(request_id)


def prompt_tokens(prompt: Any) -> int:
    """Return the tokens of a prompt as vLLM's routes make it; 0 for one that is yet to come."""
    return len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0


def start_engine(
    vllm_config: Any, args: argparse.Namespace, metrics: ServerMetrics, live: LiveFigures
) -> Engine:
    """Load the model; must run inside an event loop."""
    engine: Engine = Engine.from_vllm_config(
        vllm_config,
        # A custom stat logger would switch the statistics on again.
        stat_loggers=None if args.disable_log_stats else [metrics.stat_logger, live.stat_logger],
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
    )
    return engine
