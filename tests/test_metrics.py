"""Our series, by a clock that stands still, and in Prometheus' multiprocess mode."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from asgi_application import Application
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from sliceserve.server.admission import Admission, Limits
from sliceserve.server.deadline import Deadline
from sliceserve.server.drain import Drain
from sliceserve.server.exchange import Exchange, Outcome, Refusal, Watch, outcome_of
from sliceserve.server.health import Lifecycle, Phase
from sliceserve.server.metrics import Refreshing, ServerMetrics

LIMITS = Limits(requests=1, body_bytes=10, body_seconds=0.2)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def engine(device: str = "cuda", gpus: int = 1) -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(world_size_across_dp=gpus),
    )


def values(text: str) -> dict[tuple[str, ...], float]:
    """Our samples by short name and the values of labels other than the model's name."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "m"
            name = sample.name.removeprefix("sliceserve_")
            found[name, *sample.labels.values()] = sample.value
    return found


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("cuda", 8), ("cpu", 2)])
def test_gpu_seconds_run_from_the_start_of_the_engine_to_the_scrape(device: str, gpus: int) -> None:
    clock = Clock()
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m", clock)
    app = Refreshing(make_asgi_app(registry), lambda: metrics.refresh(3, 7, ready=True))

    async def scrape() -> dict[tuple[str, ...], float]:
        async with client_of(app) as client:
            return values((await client.get("/metrics")).text)

    clock.now += 50  # before the engine starts
    metrics.set_engine(engine(device, gpus))
    used = gpus if device == "cuda" else 0
    for pause, since in ((100, 100), (0.25, 100.25), (0, 100.25), (3600, 3700.25)):
        clock.now += pause
        scraped = asyncio.run(scrape())
        assert scraped["gpu_seconds_total",] == used * since
        assert scraped["gpus",] == used
        assert scraped["running_requests",] == 3
        assert scraped["queued_prompt_tokens",] == 7
        assert scraped["ready",] == 1


MULTIPROCESS = """
from types import SimpleNamespace
from prometheus_client import REGISTRY, generate_latest
from sliceserve.server.gpus import GpuReading
from sliceserve.server.metrics import ServerMetrics
from vllm.v1.metrics.prometheus import get_prometheus_registry

now = 0.0
metrics = ServerMetrics(REGISTRY, "m", lambda: now)
metrics.set_engine(SimpleNamespace(
    device_config=SimpleNamespace(device_type="cuda"),
    parallel_config=SimpleNamespace(world_size_across_dp=4),
))
for now in (10.0, 10.5, 70.0):
    metrics.refresh(running=int(now), queued_tokens=5, ready=True)
    metrics.set_gpu_readings({"1": GpuReading(now, 80, 0.5)})
shown = get_prometheus_registry()
assert shown is not REGISTRY
print(generate_latest(shown).decode())
"""


def test_multiprocess_mode_shows_the_same_without_a_label_of_the_process(tmp_path: Path) -> None:
    environment = os.environ | {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # where vLLM 0.24 does not log by itself
    }
    command = [sys.executable, "-c", MULTIPROCESS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown = values(result.stdout)
    assert shown["gpu_seconds_total",] == 4 * 70
    assert shown["running_requests",] == 70
    assert shown["queued_prompt_tokens",] == 5
    assert shown["ready",] == 1
    assert shown["gpu_memory_used_bytes", "1"] == 70
    assert shown["gpu_utilization_ratio", "1"] == 0.5
    assert shown["rejected_total", "full"] == 0


def test_queue_time_is_vllms_and_leaves_out_what_never_ran() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    stats = IterationStats()
    # Wait 0.5 s, nothing, and end before the first step, on vLLM's own arithmetic.
    for queued, scheduled in ((100.0, 100.5), (200.0, 200.0), (300.0, 0.0)):
        state = RequestStateStats(
            arrival_time=stats.iteration_timestamp, queued_ts=queued, scheduled_ts=scheduled,
            first_token_ts=scheduled, last_token_ts=scheduled, num_generation_tokens=1,
        )  # fmt: skip
        stats.update_from_finished_request(FinishReason.STOP, "id", 5, 1, state)
    metrics.observe(stats)

    def value(name: str, **labels: str) -> float | None:
        labels["model_name"] = "m"
        return registry.get_sample_value(f"sliceserve_{name}", labels)

    assert value("request_latency_seconds_count") == 3
    assert value("queue_time_seconds_count") == 2
    assert value("queue_time_seconds_sum") == 0.5
    assert value("queue_time_seconds_bucket", le="0.25") == 1
    assert value("queue_time_seconds_bucket", le="0.5") == 2


def test_every_reason_to_refuse_a_request_is_counted_once_and_logged() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    logged: list[Exchange] = []
    begun, going = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        begun.set()
        await going.wait()
        return PlainTextResponse(await request.body())

    async def forever() -> Any:
        yield b"a"
        await asyncio.Event().wait()

    async def show(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(generate_latest(registry))

    async def scenario() -> None:
        lifecycle = Lifecycle(Phase.SERVING)
        routes = [Route("/slow", slow, methods=["POST"]), Route("/metrics", show)]
        admission = Admission(Starlette(routes=routes), LIMITS)
        drain = Drain(admission, lifecycle, going.set)
        app = Refreshing(drain, lambda: metrics.refresh(admission.running, 0, ready=True))
        watch = Watch(app, frozenset({"/slow"}), metrics.count_response, logged.append)
        async with client_of(watch) as client:

            async def scraped() -> tuple[float, dict[str, float]]:
                found = values((await client.get("/metrics")).text)
                rejected = {key[1]: found[key] for key in found if key[0] == "rejected_total"}
                return found["running_requests",], rejected

            # From the start, so that a rate over the first refusal is not lost.
            none = dict.fromkeys(Refusal, 0)
            one = none | dict.fromkeys(("full", "body_too_large", "body_too_slow", "draining"), 1)
            assert await scraped() == (0, none)
            answers = [
                await client.post("/slow", content=b"x" * 11),
                await client.post("/slow", content=forever()),
            ]
            running = asyncio.ensure_future(client.post("/slow", content=b"fine"))
            await begun.wait()
            answers.append(await client.post("/slow"))
            lifecycle.enter(Phase.DRAINING, "waiting")
            answers.append(await client.post("/slow"))
            assert [answer.status_code for answer in answers] == [413, 408, 429, 503]
            assert await scraped() == (1, one)
            going.set()
            assert (await running).text == "fine"
            assert await scraped() == (0, one)

    asyncio.run(scenario())
    refused = {
        exchange.status: exchange.refused for exchange in logged if exchange.method == "POST"
    }
    assert refused == {
        429: "full", 413: "body_too_large", 408: "body_too_slow", 503: "draining", 200: None
    }  # fmt: skip


def test_what_runs_when_the_server_begins_to_leave_is_counted_by_its_end() -> None:
    registry = CollectorRegistry()
    metrics, application = ServerMetrics(registry, "m"), Application()

    def drained() -> dict[str, float | None]:
        name = "sliceserve_drained_requests_total"
        return {
            outcome: registry.get_sample_value(name, {"model_name": "m", "outcome": outcome})
            for outcome in Outcome
        }

    async def scenario() -> None:
        lifecycle = Lifecycle(Phase.SERVING)
        deadline = Deadline(application.app, 1000)
        drain = Drain(deadline, lifecycle, deadline.cut, metrics.count_drained)
        async with client_of(Watch(drain, frozenset())) as client:
            assert (await client.post("/answer")).status_code == 200
            running = asyncio.ensure_future(client.post("/wait"))
            streams = [asyncio.ensure_future(client.get("/stream")) for _ in range(2)]
            while drain.running < 3:
                await asyncio.sleep(0.01)
            assert drained() == {"finished": 0, "cut": 0, "left": 0}
            lifecycle.enter(Phase.DRAINING, "waiting for running requests")
            assert (await client.post("/answer")).status_code == 503
            application.going.set()
            assert (await running).status_code == 200
            assert drained() == {"finished": 1, "cut": 0, "left": 0}
            drain.cut()
            for stream in streams:
                assert (await stream).text.endswith("data: [DONE]\n\n")
            assert drained() == {"finished": 1, "cut": 2, "left": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "failed", "disconnected", "outcome"),
    [
        (200, None, False, Outcome.FINISHED),
        (404, None, False, Outcome.FINISHED),
        (503, None, False, Outcome.CUT),
        (200, 503, False, Outcome.CUT),
        (None, None, False, Outcome.CUT),
        (200, None, True, Outcome.LEFT),
        (None, None, True, Outcome.LEFT),
    ],
)
def test_how_a_request_ended(
    status: int | None, failed: int | None, disconnected: bool, outcome: Outcome
) -> None:
    exchange = Exchange("1", "POST", 0.0, status=status, failed=failed, disconnected=disconnected)
    assert outcome_of(exchange) is outcome
