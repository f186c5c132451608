"""``/livez`` and ``/readyz``: what an orchestrator may know of the server without a key."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from sliceserve.server.responses import RETRY_AFTER_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

LIVEZ = "/livez"
READYZ = "/readyz"
OVERLOADED = "overloaded"


class Phase(StrEnum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    FAILING = "failing"  # it ends because the engine hangs, or did not start in time


@dataclass
class Lifecycle:
    """The server's phase and, within it, what it is doing since when.

    One thread writes it, and the one that bounds the start when that fails; any may read it.
    """

    phase: Phase = Phase.STARTING
    step: str = "reading the options"
    since: float = field(default_factory=time.monotonic)
    weights_loaded: Callable[[], float | None] = lambda: None

    def enter(
        self,
        phase: Phase,
        step: str,
        weights_loaded: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Begin a step, and tell how to find out what share of the weights is loaded in it."""
        self.phase, self.step, self.since = phase, step, time.monotonic()
        self.weights_loaded = weights_loaded

    def describe(self) -> dict[str, Any]:
        """Return the phase, the step, the seconds it has taken and, where known, its progress."""
        seconds = round(time.monotonic() - self.since, 1)
        state = {"status": self.phase.value, "step": self.step, "seconds": seconds}
        loaded = self.weights_loaded()
        return state if loaded is None else state | {"weights_loaded": loaded}


class EngineProbe:
    """Asks the engine for an answer, one question at a time however many callers there are."""

    def __init__(self, ask: Callable[[], Awaitable[object]], timeout: float) -> None:
        """Take the question, whose answer is ignored, and the seconds it may take."""
        self._ask, self._timeout = ask, timeout
        self._question: asyncio.Future[object] | None = None
        self._asked = 0.0
        self.problem: str | None = None

    async def check(self) -> str | None:
        """Return None once the engine answers, or what is wrong with it within the timeout.

        `problem` keeps it until the next check.
        """
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self._ask())
            self._asked = time.monotonic()
        question = self._question
        # Not wait_for, which would cancel the question for the other callers.
        await asyncio.wait([question], timeout=self._left())
        if not question.done():
            seconds = time.monotonic() - self._asked
            self.problem = f"the engine has not answered for {seconds:.1f} s"
        elif question.cancelled() or question.exception() is not None:
            self.problem = "the engine is dead"
        else:
            self.problem = None
        return self.problem

    async def wait_until_hung(self, seconds: float) -> None:
        """Return once a question has had no answer for as long; a dead engine is none that hangs.

        Asks all the while, as a hang shows in nothing else.
        """
        while True:
            await self.check()
            asked = self._question is not None and not self._question.done()
            if asked and time.monotonic() - self._asked >= seconds:
                return
            await asyncio.sleep(min(1.0, self._timeout))

    def _left(self) -> float:
        return max(0.0, self._asked + self._timeout - time.monotonic())


@dataclass(frozen=True)
class Readiness:
    """Whether the server takes requests: what `/readyz` and the gauge say.

    Attributes:
        lifecycle: the server's phase.
        probe: of the engine, once there is one; used only while serving.
        overloaded: whether new requests would be refused for want of room.

    """

    lifecycle: Lifecycle
    probe: EngineProbe | None = None
    overloaded: Callable[[], bool] = lambda: False

    def obstacle(self) -> str | None:
        """Return the status that stands in the way, by the engine's last answer; None if ready."""
        phase = self.lifecycle.phase
        if phase is not Phase.SERVING:
            return phase.value
        if self.probe is not None and self.probe.problem is not None:
            return Phase.FAILING.value
        return OVERLOADED if self.overloaded() else None


class Health:
    """ASGI layer that answers the two routes and passes everything else on."""

    def __init__(self, app: ASGIApp, readiness: Readiness) -> None:
        """Wrap the application, which answers all other routes."""
        self.app, self._readiness = app, readiness

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a probe, or pass the request on; no coroutine, which would cost all a frame."""
        if (
            scope["type"] == "http"
            and scope["path"] in (LIVEZ, READYZ)
            and scope["method"] in ("GET", "HEAD")
        ):
            return self._answer(scope, receive, send)
        return self.app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._response(scope["path"]))(scope, receive, send)

    async def _response(self, path: str) -> JSONResponse:
        lifecycle, probe = self._readiness.lifecycle, self._readiness.probe
        # While it starts or drains, the engine answers no questions; both have an end.
        if lifecycle.phase is Phase.SERVING and probe is not None:
            await probe.check()
        state = lifecycle.describe()
        serving = lifecycle.phase is Phase.SERVING
        obstacle = self._readiness.obstacle()
        failing = obstacle == Phase.FAILING.value
        if serving and failing and probe is not None:
            state |= {"status": obstacle, "step": probe.problem}
        elif serving and obstacle is not None and path == READYZ:
            state["status"] = obstacle
        healthy = not failing if path == LIVEZ else obstacle is None
        headers = {"Cache-Control": "no-store"}
        if not healthy:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        # The listener changes between the phases, so a connection must not outlive one.
        if not serving:
            headers["Connection"] = "close"
        return JSONResponse(state, 200 if healthy else 503, headers)
