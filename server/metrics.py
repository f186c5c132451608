"""The server's own Prometheus series, next to those of vLLM.

Their source is what vLLM's engine reports to its stat loggers after every step. A request for
``n`` sequences is ``n`` requests to the engine: each sequence counts its prompt and its latency.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import StatLoggerBase

from sliceserve.server.drain import METRICS
from sliceserve.server.exchange import Outcome, Refusal
from sliceserve.server.protocol import HEAD_STATUSES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prometheus_client import CollectorRegistry
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sliceserve.server.exchange import Exchange
    from sliceserve.server.gpus import GpuReading

# The bucket bounds that OpenTelemetry's GenAI conventions recommend for
# gen_ai.server.request.duration, time_to_first_token and time_per_output_token.
# fmt: off
REQUEST_LATENCY_BUCKETS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)
TIME_PER_OUTPUT_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)
# fmt: on


class ServerMetrics:
    """All ``sliceserve_`` series of one process; create one per registry."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                name, documentation, ["model_name"], buckets=buckets, registry=registry
            ).labels(model_name)

        def counter(name: str, documentation: str) -> Counter:
            return Counter(name, documentation, ["model_name"], registry=registry).labels(
                model_name
            )

        # The multiprocess mode has an effect only under PROMETHEUS_MULTIPROC_DIR; without it
        # the gauges would get a pid label there.
        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(
                name,
                documentation,
                ["model_name", *labels],
                registry=registry,
                multiprocess_mode="mostrecent",
            )

        self._model_name, self._clock = model_name, clock
        self._gpu_count, self._counted_until = 0, clock()
        self._gpus = gauge(
            "sliceserve_gpus",
            "GPUs that the engine uses: all tensor, pipeline and data parallel ranks; 0 on a CPU.",
        ).labels(model_name)
        self._gpu_seconds = counter(
            "sliceserve_gpu_seconds",
            "GPUs that the engine uses times seconds since its start, loading and idling included.",
        )
        self._gpu_memory_used = gauge(
            "sliceserve_gpu_memory_used_bytes",
            "GPU memory in use, by all processes, of the GPUs that the engine uses here.",
            "gpu",
        )
        self._gpu_memory_total = gauge(
            "sliceserve_gpu_memory_total_bytes", "Memory of these GPUs.", "gpu"
        )
        self._gpu_utilization = gauge(
            "sliceserve_gpu_utilization_ratio",
            "Share of NVML's last sample period in which a kernel ran on the GPU.",
            "gpu",
        )
        self._ready = gauge(
            "sliceserve_ready", "1 while /readyz answers 200, else 0, by the engine's last answer."
        ).labels(model_name)
        self._running = gauge(
            "sliceserve_running_requests",
            "Requests let in and not over, of those that --max-requests counts.",
        ).labels(model_name)
        self._queued_tokens = gauge(
            "sliceserve_queued_prompt_tokens",
            "Tokens of the prompts in the engine that have no first token yet.",
        ).labels(model_name)
        self._parameters = gauge(
            "sliceserve_parameters",
            "Parameters of the model, before (dense) and after (sliced) slicing.",
            "form",
        )
        # Looking a series up by its labels takes longer than counting.
        self._answered: dict[tuple[str, str], Counter] = {}
        self._http_responses = Counter(
            "sliceserve_http_responses",
            "HTTP requests by route and status, of streams that failed that of their error; "
            "disconnected: the client left before the end.",
            ["model_name", "route", "status"],
            registry=registry,
        )
        self._rejected = Counter(
            "sliceserve_rejected",
            "HTTP requests with a valid key that never reached the engine, by reason of refusal.",
            ["model_name", "reason"],
            registry=registry,
        )
        for reason in Refusal:
            self._rejected.labels(model_name, reason)
        self._refused_heads = Counter(
            "sliceserve_refused_heads",
            "Heads of requests that were too slow, too large or no HTTP, by the status of refusal.",
            ["model_name", "status"],
            registry=registry,
        )
        for status in HEAD_STATUSES:
            self._refused_heads.labels(model_name, str(status))
        self._drained = Counter(
            "sliceserve_drained_requests",
            "HTTP requests that ran when the server began to leave or its engine hung, by outcome.",
            ["model_name", "outcome"],
            registry=registry,
        )
        for outcome in Outcome:
            self._drained.labels(model_name, outcome)
        self._request_latency = histogram(
            "sliceserve_request_latency_seconds",
            "Seconds from a request's arrival to its last token.",
            REQUEST_LATENCY_BUCKETS,
        )
        self._time_to_first_token = histogram(
            "sliceserve_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            TIME_TO_FIRST_TOKEN_BUCKETS,
        )
        # A part of the time to first token, so both have the same buckets.
        self._queue_time = histogram(
            "sliceserve_queue_time_seconds",
            "Seconds that a request waits in the engine until it first runs.",
            TIME_TO_FIRST_TOKEN_BUCKETS,
        )
        self._time_per_output_token = histogram(
            "sliceserve_time_per_output_token_seconds",
            "Mean seconds per token after the first, of requests with more than one token.",
            TIME_PER_OUTPUT_TOKEN_BUCKETS,
        )
        self._prompt_tokens = counter(
            "sliceserve_prompt_tokens", "Prompt tokens processed, cached ones included."
        )
        self._generation_tokens = counter(
            "sliceserve_generation_tokens", "Tokens generated, those of aborted requests included."
        )

    def set_engine(self, vllm_config: Any) -> None:
        """Set the number of GPUs from the configuration of an engine that starts now."""
        self._gpu_count = gpus_of(vllm_config)
        self._gpus.set(self._gpu_count)
        self._counted_until = self._clock()

    def set_parameters(self, dense: int, sliced: int) -> None:
        """Set the model's true parameter counts."""
        self._parameters.labels(self._model_name, "dense").set(dense)
        self._parameters.labels(self._model_name, "sliced").set(sliced)

    def count_response(self, exchange: Exchange) -> None:
        """Add one HTTP request that is over."""
        status = "disconnected" if exchange.disconnected else exchange.failed or exchange.status
        labels = (exchange.route, str(status))
        if (series := self._answered.get(labels)) is None:
            series = self._answered[labels] = self._http_responses.labels(self._model_name, *labels)
        series.inc()
        if exchange.refused is not None:
            self._rejected.labels(self._model_name, exchange.refused).inc()

    def count_refused_head(self, status: int) -> None:
        """Add one head that was refused before it was a request."""
        self._refused_heads.labels(self._model_name, str(status)).inc()

    def count_drained(self, outcome: Outcome) -> None:
        """Add one HTTP request that was running when the server began to leave."""
        self._drained.labels(self._model_name, outcome).inc()

    def set_gpu_readings(self, readings: dict[str, GpuReading]) -> None:
        """Set what the GPUs tell, by their names."""
        for gpu, reading in readings.items():
            labels = (self._model_name, gpu)
            self._gpu_memory_used.labels(*labels).set(reading.memory_used)
            self._gpu_memory_total.labels(*labels).set(reading.memory_total)
            self._gpu_utilization.labels(*labels).set(reading.utilization)

    def refresh(self, running: int, queued_tokens: int, *, ready: bool) -> None:
        """Bring the series that no event changes up to date.

        Args:
            running: requests let in and not over.
            queued_tokens: of prompts that have no first token yet.
            ready: whether `/readyz` answers 200.

        """
        now = self._clock()
        self._gpu_seconds.inc(self._gpu_count * (now - self._counted_until))
        self._counted_until = now
        self._ready.set(ready)
        self._running.set(running)
        self._queued_tokens.set(queued_tokens)

    def observe(self, stats: Any) -> None:
        """Add one engine step's ``IterationStats``."""
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._generation_tokens.inc(stats.num_generation_tokens)
        for seconds in stats.time_to_first_tokens_iter:
            self._time_to_first_token.observe(seconds)
        for request in stats.finished_requests:
            self._request_latency.observe(request.e2e_latency)
            # Negative where it ended before it ran.
            if request.queued_time >= 0:
                self._queue_time.observe(request.queued_time)
            if request.num_generation_tokens > 1:
                self._time_per_output_token.observe(request.mean_time_per_output_token)

    def stat_logger(self, vllm_config: Any, engine_index: int) -> MetricsStatLogger:  # noqa: ARG002
        """Return a stat logger of one engine; a factory as ``AsyncLLM`` takes them."""
        return MetricsStatLogger(self)


class Refreshing:
    """ASGI layer that brings series up to date before `/metrics` shows them.

    A function that Prometheus' client calls when it collects would do for one process; in its
    multiprocess mode it shows what was written before.
    """

    def __init__(self, app: ASGIApp, refresh: Callable[[], None]) -> None:
        self.app, self._refresh = app, refresh

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass every request on; no coroutine, which would cost a frame."""
        # vLLM shows them under longer paths too.
        if scope["type"] == "http" and scope["path"].startswith(METRICS):
            self._refresh()
        return self.app(scope, receive, send)


def gpus_of(vllm_config: Any) -> int:
    """Return the number of GPUs that the engine uses; 0 on a CPU."""
    on_cpu = vllm_config.device_config.device_type == "cpu"
    return 0 if on_cpu else int(vllm_config.parallel_config.world_size_across_dp)


class MetricsStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Passes one engine's statistics on to the process's ``ServerMetrics``."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def record(
        self,
        scheduler_stats: Any,  # noqa: ARG002
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Take the statistics of one engine step."""
        if iteration_stats is not None:
            self._metrics.observe(iteration_stats)

    def log_engine_initialized(self) -> None:
        """Do nothing: there is nothing to log."""
