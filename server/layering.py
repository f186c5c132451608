"""The ASGI layers around vLLM's application, and the order in which a request meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware

from sliceserve.server import vllm_compat
from sliceserve.server.admission import Admission, Limits
from sliceserve.server.arguments import Arguments
from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.bounds import Bounds
from sliceserve.server.deadline import Deadline
from sliceserve.server.drain import METRICS, Drain
from sliceserve.server.exchange import Exchange, Watch
from sliceserve.server.faults import Faults
from sliceserve.server.health import LIVEZ, READYZ, EngineProbe, Health, Lifecycle, Readiness
from sliceserve.server.metrics import Refreshing, ServerMetrics
from sliceserve.server.per_key import NO_LIMITS, KeyLimits, PerKey
from sliceserve.server.queued import QueueLimit
from sliceserve.server.responses import unavailable
from sliceserve.server.sockets import SocketDeadline
from sliceserve.server.status_page import PAGE, StatusPage
from sliceserve.server.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sliceserve.server.engine import Engine
    from sliceserve.server.settings import ServerSettings

OWN_PATHS = frozenset({LIVEZ, READYZ, METRICS, PAGE})


@dataclass(frozen=True)
class Access:
    """Who may reach what.

    Attributes:
        keys: that open the server, if there are any.
        public: exact paths that anyone may GET.
        cross_origin: what Starlette's CORS layer is told; empty where browsers let no other origin
            in.

    """

    keys: KeyRing
    public: frozenset[str]
    cross_origin: Mapping[str, Any]


def while_starting(
    access: Access, lifecycle: Lifecycle, log: Callable[[Exchange], None]
) -> ASGIApp:
    """Return what answers until there is an engine."""
    return Watch(guarded(still_starting, access, Readiness(lifecycle)), OWN_PATHS, log)


def while_serving(
    app: FastAPI,
    engine: Engine,
    probe: EngineProbe,
    access: Access,
    settings: ServerSettings,
    lifecycle: Lifecycle,
    metrics: ServerMetrics,
    log: Callable[[Exchange], None],
    *,
    max_logprobs: int,
    vocabulary: int,
    traces: bool,
) -> tuple[ASGIApp, Drain]:
    """Return vLLM's application behind all layers, and the one of them that counts what runs.

    Args:
        app: vLLM's application.
        engine: the engine behind it.
        probe: of the engine.
        access: who may reach what.
        settings: the bounds.
        lifecycle: the server's phase.
        metrics: shown by the application's `/metrics`.
        log: takes every request that is over.
        max_logprobs: of one token; -1 is no bound, as in vLLM.
        vocabulary: of the model, in tokens.
        traces: whether every request gets a span.

    """
    queue = engine.queue
    # A stream that is cancelled would not be counted down.
    counted = getattr(app.state, "enable_server_load_tracking", False)
    streaming = app if counted else Streams(app)
    # It holds the beginning of an answer, of which streams have to know.
    limited = streaming if queue is None else QueueLimit(streaming, queue)
    deadline = _bounded(limited, settings, None if max_logprobs == -1 else max_logprobs, vocabulary)
    sockets = SocketDeadline(deadline, settings.request_timeout)
    admission = Admission(sockets, _limits(settings))

    def cut() -> None:
        deadline.cut()
        sockets.cut()

    limits = _key_limits(settings)
    keyed = admission if limits == NO_LIMITS else PerKey(admission, limits)
    drain = Drain(keyed, lifecycle, cut, metrics.count_drained)

    def overloaded() -> bool:
        return admission.full or (queue is not None and queue.full)

    readiness = Readiness(lifecycle, probe, overloaded)

    def refresh() -> None:
        ready = readiness.obstacle() is None
        metrics.refresh(admission.running, engine.queued_tokens(), ready=ready)

    serving = guarded(Refreshing(drain, refresh), access, readiness)
    routes = known_paths(app)
    if traces:
        serving = traced(serving, routes)
    return Watch(serving, routes, metrics.count_response, log), drain


def guarded(app: ASGIApp, access: Access, readiness: Readiness) -> ASGIApp:
    """Return the application behind what is open to all and, if there are keys, behind them.

    Browsers show a page of another origin our refusals too, if they let it in.
    """
    if access.keys:
        app = Auth(app, access.keys, access.public)
    page = StatusPage(app, keyed=bool(access.keys))
    health = Health(page, readiness)
    return CORSMiddleware(health, **access.cross_origin) if access.cross_origin else health


def traced(app: ASGIApp, routes: frozenset[str]) -> ASGIApp:
    """Return the application with a span a request."""
    from sliceserve.server.tracing import Trace  # needs what vLLM needs for its own traces only

    return Trace(app, routes, OWN_PATHS)


def known_paths(app: FastAPI) -> frozenset[str]:
    """Return the paths of the application's routes and of ours."""
    paths = (getattr(route, "path", None) for route in app.routes)
    return OWN_PATHS | frozenset(filter(None, paths))


async def still_starting(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI application in the place of vLLM's while there is no engine."""
    await unavailable("The model is still loading; try again.")(scope, receive, send)


def _bounded(
    app: ASGIApp, settings: ServerSettings, logprobs: int | None, vocabulary: int
) -> Deadline:
    """Return the application with bounds on what one request asks and how long it takes."""
    bounds = Bounds(
        settings.max_sequences, settings.max_output_tokens, settings.max_stops, logprobs, vocabulary
    )
    faults = Faults(Arguments(app, bounds), vllm_compat.READING)
    return Deadline(faults, settings.request_timeout)


def _limits(settings: ServerSettings) -> Limits:
    return Limits(settings.max_requests, settings.max_body_size, settings.body_timeout)


def _key_limits(settings: ServerSettings) -> KeyLimits:
    return KeyLimits(
        settings.key_max_requests,
        settings.key_requests_per_minute,
        settings.key_tokens_per_minute,
    )
