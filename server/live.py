"""What the engine has done in the last seconds, for people to look at: `/status.json`.

`/metrics` counts from the start and leaves windows to Prometheus; a page has no Prometheus.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

if TYPE_CHECKING:
    from collections.abc import Callable

RATE_SECONDS = 10
LATENCY_SECONDS = 60
# With more in the window, the median is that of the latest.
LATENCIES_KEPT = 1000


class LiveFigures:
    """Throughput, requests and latencies of all engines; memory and cost are bounded."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing seen; `now` gives seconds that only grow."""
        self._now = now
        self._tokens: deque[tuple[int, int]] = deque()
        self._first: deque[tuple[float, float]] = deque(maxlen=LATENCIES_KEPT)
        self._each: deque[tuple[float, float]] = deque(maxlen=LATENCIES_KEPT)
        # Empty where vLLM's statistics are off.
        self._requests: dict[int, tuple[int, int]] = {}

    def describe(self) -> dict[str, Any]:
        """Return the figures as JSON values, None where nothing was seen."""
        known = bool(self._requests)
        return {
            "requests_running": sum(n for n, _ in self._requests.values()) if known else None,
            "requests_waiting": sum(n for _, n in self._requests.values()) if known else None,
            "generation_tokens_per_second": self._rate() if known else None,
            "time_to_first_token_seconds": self._median(self._first),
            "time_per_output_token_seconds": self._median(self._each),
        }

    def see_queues(self, stats: Any, engine: int) -> None:
        """Take one engine's ``SchedulerStats``."""
        waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        self._requests[engine] = (stats.num_running_reqs, waiting)

    def see_step(self, stats: Any) -> None:
        """Take one engine step's ``IterationStats``."""
        now = self._now()
        second, tokens = int(now), stats.num_generation_tokens
        if self._tokens and self._tokens[-1][0] == second:
            tokens += self._tokens.pop()[1]
        self._tokens.append((second, tokens))
        while self._tokens[0][0] < second - RATE_SECONDS:
            self._tokens.popleft()
        self._first.extend((now, seconds) for seconds in stats.time_to_first_tokens_iter)
        self._each.extend(
            (now, request.mean_time_per_output_token)
            for request in stats.finished_requests
            if request.num_generation_tokens > 1
        )

    def stat_logger(self, vllm_config: Any, engine_index: int) -> LiveStatLogger:  # noqa: ARG002
        """Return a stat logger of one engine; a factory as ``AsyncLLM`` takes them."""
        self._requests[engine_index] = (0, 0)
        return LiveStatLogger(self)

    def _rate(self) -> float:
        # Of whole seconds, so that the one that has just begun does not pull it down.
        end = int(self._now())
        seen = (tokens for second, tokens in self._tokens if end - RATE_SECONDS <= second < end)
        return sum(seen) / RATE_SECONDS

    def _median(self, samples: deque[tuple[float, float]]) -> float | None:
        start = self._now() - LATENCY_SECONDS
        recent = [seconds for seen, seconds in samples if seen >= start]
        return median(recent) if recent else None


class LiveStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Passes one engine's statistics on to the process's ``LiveFigures``."""

    def __init__(self, figures: LiveFigures) -> None:
        self._figures = figures

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,
    ) -> None:
        """Take the statistics of one engine step."""
        if scheduler_stats is not None:
            self._figures.see_queues(scheduler_stats, engine_idx)
        if iteration_stats is not None:
            self._figures.see_step(iteration_stats)

    def log_engine_initialized(self) -> None:
        """Do nothing: there is nothing to log."""
