"""Collectors of OpenTelemetry traces for tests: one that keeps them, and one that never answers."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

WAIT_S = 60


class Collector(ThreadingHTTPServer):
    """Keeps the spans that exporters send."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []

    @property
    def url(self) -> str:
        """Where exporters send to."""
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def wait_for(self, wanted: Callable[[Any], bool]) -> Any:
        """The first span that is wanted."""
        end = time.monotonic() + WAIT_S
        while not (found := [span for span in self.spans if wanted(span)]):
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.1)
        return found[0]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector for the time of the block."""
    with Collector() as collector:
        thread = Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


@contextmanager
def silent_collector() -> Iterator[str]:
    """Where exporters can send to for the time of the block, and get no answer."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        # The system takes in the connections and what comes on them.
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1/traces"
