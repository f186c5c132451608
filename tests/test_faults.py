"""What a client is told of an error: the same by vLLM's application and in a stream of its."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from asgi_application import client_of, error_of
from fastapi import FastAPI
from jinja2 import TemplateError
from starlette.responses import Response, StreamingResponse
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from sliceserve.server import vllm_compat
from sliceserve.server.exchange import Exchange, Watch
from sliceserve.server.faults import Faults
from sliceserve.server.queued import QueueLimit, TokenQueue
from sliceserve.server.serve import make_parser, parse_arguments

SAID = "what-the-client-said"
# As vLLM's `create_error_response` has them, for /v1/chat/completions too.
ERRORS: list[tuple[Exception, int, str, str | None]] = [
    (VLLMValidationError(SAID, parameter="logit_bias"), 400, "BadRequestError", "logit_bias"),
    (VLLMNotFoundError(SAID), 404, "NotFoundError", None),
    (ValueError(SAID), 400, "BadRequestError", None),
    (TypeError(SAID), 400, "BadRequestError", None),
    (OverflowError(SAID), 400, "BadRequestError", None),
    (TemplateError(SAID), 400, "BadRequestError", None),
    (NotImplementedError(SAID), 501, "NotImplementedError", None),
    (KeyError(SAID), 500, "InternalServerError", None),
    (RuntimeError(SAID), 500, "InternalServerError", None),
]
FAILURES = pytest.mark.parametrize(
    ("error", "status", "kind", "param"), ERRORS, ids=lambda value: type(value).__name__
)


def vllm_that_fails(error: Exception) -> FastAPI:
    """vLLM's application, with routes that fail: /whole, /early in a stream, /late in one."""
    args, _ = parse_arguments(make_parser(), ["DIR", "--host", "127.0.0.1"])
    level = logging.root.level
    app = vllm_compat.build_app(args, (), None)
    logging.root.setLevel(level)  # what vLLM imports for its routes has set another

    @app.post("/whole")
    async def whole() -> None:
        raise error

    @app.post("/{when}")
    async def stream(when: str) -> Response:
        async def events() -> AsyncIterator[str]:
            if when == "late":
                yield "event: begun\ndata: {}\n\n"
            raise error

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def post(app: Any, path: str) -> tuple[httpx.Response, Exchange]:
    """An answer, and what is noted of it."""
    noted: list[Exchange] = []

    async def once() -> httpx.Response:
        async with client_of(Watch(app, frozenset(), noted.append)) as client:
            return await client.post(path)

    answer = asyncio.run(once())
    (exchange,) = noted
    return answer, exchange


def told(error: dict[str, Any]) -> tuple[int, str, str | None]:
    return error["code"], error["type"], error["param"]


@FAILURES
def test_an_error_has_its_status_in_an_answer_and_in_a_stream(
    error: Exception, status: int, kind: str, param: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    app = Faults(vllm_that_fails(error))
    whole, exchange = post(app, "/whole")
    assert told(error_of(whole, status)) == (status, kind, param)
    assert (exchange.status, exchange.failed) == (status, None)
    for path, events in (("/early", 0), ("/late", 1)):
        stream, exchange = post(app, path)
        assert (stream.status_code, exchange.status, exchange.failed) == (200, 200, status)
        *before, last, done = stream.text.removesuffix("\n\n").split("\n\n")
        assert (before, done) == (["event: begun\ndata: {}"] * events, "data: [DONE]")
        assert told(json.loads(last.removeprefix("data: "))["error"]) == (status, kind, param)
        # The client's own fault is told to the client and not to the log, all else the other way.
        assert (SAID in stream.text) == (status != 500)
    assert (SAID in caplog.text) == (status >= 500)


@FAILURES
def test_a_stream_that_is_held_back_ends_with_the_status_itself(
    error: Exception, status: int, kind: str, param: str | None
) -> None:
    app = Faults(QueueLimit(vllm_that_fails(error), TokenQueue(10, int)))
    answer, exchange = post(app, "/late")
    assert told(error_of(answer, status)) == (status, kind, param)
    assert exchange.status == status


def test_what_cannot_be_encoded_is_told_all_the_same() -> None:
    async def fails(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ValueError("a\ud800b")

    answer, _ = post(Faults(fails), "/")
    assert error_of(answer, 400)["message"] == "a?b"
