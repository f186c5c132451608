"""`sliceserve_ready`: what `/readyz` answers, for Prometheus, in every state of the server."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sliceserve.server.auth import KeyRing
from sliceserve.server.health import EngineProbe, Lifecycle, Phase
from sliceserve.server.layering import Access, while_serving
from sliceserve.server.metrics import ServerMetrics
from sliceserve.server.queued import TokenQueue
from sliceserve.server.settings import ServerSettings


class Engine:
    """Answers unless it is told not to, and has so many tokens in its queue."""

    def __init__(self) -> None:
        self.tokens = 0
        self.queue = TokenQueue(100, self.queued_tokens)
        self.answers: asyncio.Event = asyncio.Event()
        self.answers.set()
        self.dead = False

    def queued_tokens(self) -> int:
        return self.tokens

    async def answer(self) -> None:
        await self.answers.wait()
        if self.dead:
            raise RuntimeError("it is dead")


def test_it_is_1_exactly_while_the_route_answers_200() -> None:
    told: list[tuple[str, bool]] = []
    begun, going = asyncio.Event(), asyncio.Event()

    async def slow(_request: Request) -> PlainTextResponse:
        begun.set()
        await going.wait()
        return PlainTextResponse("done")

    async def scenario() -> None:
        registry, engine = CollectorRegistry(), Engine()
        lifecycle, settings = Lifecycle(), ServerSettings(max_requests=1)
        metrics = ServerMetrics(registry, "m")

        async def show(_request: Request) -> PlainTextResponse:
            return PlainTextResponse(generate_latest(registry))

        routes = [Route("/slow", slow, methods=["POST"]), Route("/metrics", show)]
        application: Any = Starlette(routes=routes)
        stand_in: Any = SimpleNamespace(queue=engine.queue, queued_tokens=engine.queued_tokens)
        probe = EngineProbe(engine.answer, 0.1)
        access = Access(KeyRing(), frozenset(), {})
        app, _ = while_serving(
            application, stand_in, probe, access, settings, lifecycle, metrics,
            lambda _exchange: None, max_logprobs=20, vocabulary=257, traces=False,
        )  # fmt: skip
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def look() -> None:
                route = await client.get("/readyz")
                text = (await client.get("/metrics")).text
                (value,) = (
                    sample.value
                    for family in text_string_to_metric_families(text)
                    for sample in family.samples
                    if sample.name == "sliceserve_ready" and sample.labels == {"model_name": "m"}
                )
                told.append((route.json()["status"], bool(value)))
                assert value == (route.status_code == 200)

            await look()
            lifecycle.enter(Phase.SERVING, "answering requests")
            await look()
            running = asyncio.ensure_future(client.post("/slow"))
            await begun.wait()
            await look()
            going.set()
            await running
            await look()
            engine.tokens = 100
            await look()
            engine.tokens = 0
            engine.answers.clear()
            await look()
            engine.answers.set()
            await asyncio.sleep(0)
            await look()
            engine.dead = True
            await look()
            engine.dead = False
            await look()
            lifecycle.enter(Phase.DRAINING, "waiting for running requests")
            await look()
            lifecycle.enter(Phase.FAILING, "the engine hangs")
            await look()

    asyncio.run(scenario())
    assert told == [
        ("starting", False),
        ("serving", True),
        ("overloaded", False),
        ("serving", True),
        ("overloaded", False),
        ("failing", False),
        ("serving", True),
        ("failing", False),
        ("serving", True),
        ("draining", False),
        ("failing", False),
    ]
