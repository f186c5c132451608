"""Our span of a request in a trace: the client's span is its parent, and vLLM's is its child."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders

from sliceserve.server.exchange import exchange_of, route_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_FIRST_SERVER_ERROR = 500
# Seconds for the last spans, of a collector that may be gone: its own bounds make half a minute.
FLUSH_S = 3.0


class Trace:
    """ASGI layer within `Watch` that opens a span a request and hands it on in `traceparent`.

    The span goes where vLLM's tracer provider sends its own, so the engine must have started.
    Names and attributes are those of OpenTelemetry's conventions for HTTP servers.
    """

    def __init__(self, app: ASGIApp, routes: frozenset[str], untraced: frozenset[str]) -> None:
        """Wrap the application.

        Args:
            app: what answers.
            routes: the templates that name spans, as in `Watch`.
            untraced: paths that open no span.

        """
        self.app, self._routes, self._untraced = app, routes, untraced
        self._tracer = trace.get_tracer("sliceserve")
        self._headers = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within a span."""
        exchange = exchange_of(scope)
        if exchange is None or scope["path"] in self._untraced:
            await self.app(scope, receive, send)
            return
        parent = self._headers.extract(dict(Headers(scope=scope)))
        with self._tracer.start_as_current_span(
            exchange.method, parent, trace.SpanKind.SERVER
        ) as span:
            handed: dict[str, str] = {}
            self._headers.inject(handed)
            # In this scope itself, in which `Watch` looks for the route in the end.
            MutableHeaders(scope=scope).update(handed)
            try:
                await self.app(scope, receive, send)
            finally:
                route = route_of(scope, self._routes)
                span.update_name(f"{exchange.method} {route}")
                span.set_attribute("http.request.method", exchange.method)
                span.set_attribute("http.route", route)
                span.set_attribute("sliceserve.request.id", exchange.id)
                if exchange.status is not None:
                    span.set_attribute("http.response.status_code", exchange.status)
                    if (exchange.failed or exchange.status) >= _FIRST_SERVER_ERROR:
                        span.set_status(trace.StatusCode.ERROR)


def end_traces() -> None:
    """Send the last spans, within FLUSH_S seconds; what the collector has not taken then is lost.

    Nothing is left for the exit of the process to send.
    """
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        return
    # It would wait for the exporter once more.
    atexit.unregister(provider.shutdown)
    ending = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
    ending.start()
    ending.join(FLUSH_S)
