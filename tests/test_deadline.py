"""How long a request may take, and how an answer ends that cannot go on."""

import asyncio
import gc
import json
import time
import weakref
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from asgi_application import Application, client_of, error_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sliceserve.server import deadline
from sliceserve.server.deadline import Deadline
from sliceserve.server.exchange import Exchange, Watch
from sliceserve.server.faults import Faults


def test_an_answer_that_does_not_begin_in_time_is_given_up() -> None:
    async def scenario() -> None:
        application = Application()
        async with client_of(Deadline(application.app, 0.2)) as client:
            late = await client.post("/wait", json={})
        assert "within 0.2 s" in error_of(late, 408)["message"]
        assert late.headers["x-should-retry"] == "false"
        assert application.left.is_set()

    asyncio.run(scenario())


def test_a_stream_that_does_not_end_in_time_ends_with_an_error() -> None:
    async def scenario() -> None:
        application = Application()
        async with client_of(Deadline(application.app, 0.2)) as client:
            answer = await client.post("/stream", json={})
        assert answer.status_code == 200
        first, *_, error, done = answer.text.strip().split("\n\n")
        assert (first, done) == ("data: 0", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 408
        assert application.left.is_set()

    asyncio.run(scenario())


def test_a_request_that_is_over_leaves_no_garbage() -> None:
    """What only a collection frees would keep a request's memory until there is one."""

    class Client:
        async def receive(self) -> Any:
            await asyncio.get_running_loop().create_future()

        async def send(self, message: Any) -> None:
            pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # As vLLM's routes wait for the client's leaving.
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await Response("done")(scope, receive, send)

    async def scenario() -> "weakref.ref[Client]":
        exchanges: list[Exchange] = []
        layers = Watch(Faults(Deadline(app, 60)), frozenset(), exchanges.append)
        client = Client()
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await asyncio.create_task(layers(scope, client.receive, client.send))
        assert exchanges[0].chunks == 1
        return weakref.ref(client)

    gc.disable()
    try:
        assert asyncio.run(scenario())() is None
    finally:
        gc.enable()


def test_what_runs_when_the_server_ends_is_told_so() -> None:
    async def scenario() -> None:
        application = Application()
        layer = Deadline(application.app, 60)
        async with client_of(layer) as client:
            asked = [asyncio.ensure_future(client.post(f"/{name}")) for name in ("wait", "stream")]
            while application.reached < 1:
                await asyncio.sleep(0)
            layer.cut()
            late, stream = await asyncio.gather(*asked)
            assert error_of(await client.post("/wait"), 503)
        assert "shutting down" in error_of(late, 503)["message"]
        assert int(late.headers["retry-after"]) > 0
        *_, error, done = stream.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503

    asyncio.run(scenario())


def test_the_end_of_the_server_and_of_a_requests_time_may_coincide() -> None:
    async def scenario() -> None:
        application = Application()
        layer = Deadline(application.app, 0.1)
        faults: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        async with client_of(layer) as client:
            asked = asyncio.ensure_future(client.post("/wait"))
            while not application.reached:
                await asyncio.sleep(0)
            loop.call_later(0.2, layer.cut)
            time.sleep(0.4)
            assert (await asked).status_code == 503
        assert faults == []

    asyncio.run(scenario())


@pytest.mark.parametrize("others_first", [True, False])
def test_who_cancels_what_waits_as_its_time_ends_is_heard(*, others_first: bool) -> None:
    """As vLLM's routes do with what waits for the client's leaving, once they have answered."""
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        for end in (waiting.cancel, layer.cut) if others_first else (layer.cut, waiting.cancel):
            end()
        await asyncio.wait([waiting])
        seen.append(waiting.cancelled())
        await Response("done")(scope, receive, send)

    async def receive() -> Any:
        await asyncio.get_running_loop().create_future()

    async def scenario() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await layer(scope, receive, send)
        assert [message.get("body") for message in sent[1:]] == [b"done"]

    layer = Deadline(app, 60)
    asyncio.run(scenario())
    assert seen == [True]


def test_what_is_in_time_stays_as_it_is() -> None:
    async def scenario() -> None:
        application = Application()
        application.going.set()
        async with client_of(Deadline(application.app, 5)) as client:
            assert (await client.post("/answer", json={})).json() == {"model": "m"}

    asyncio.run(scenario())


def test_a_client_that_reads_nothing_does_not_keep_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stuck(message: Any) -> None:
        if message.get("more_body"):
            await asyncio.Event().wait()

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def scenario(path: str) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
        await Deadline(Application().app, 0.2)(scope, receive, stuck)

    monkeypatch.setattr(deadline, "LAST_WORDS_S", 0.2)
    asyncio.run(asyncio.wait_for(scenario("/stream"), 60))


class Failing:
    """Fails after so many messages of an answer."""

    def __init__(
        self, media_type: str, messages: int, status: int = 200, kind: type[Exception] = ValueError
    ) -> None:
        self.media_type, self.messages, self.status = media_type, messages, status
        self.kind = kind

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        header = (b"content-type", self.media_type.encode())
        start = {"type": "http.response.start", "status": self.status, "headers": [header]}
        part = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
        for message in [start, part][: self.messages]:
            await send(message)
        raise self.kind("secret of the house")


@pytest.mark.parametrize(("messages", "status"), [(0, 500), (1, 200), (2, 200)])
def test_a_failure_ends_a_stream_in_order(
    messages: int, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[Exchange] = []

    async def once() -> httpx.Response:
        failing = Failing("text/event-stream; charset=utf-8", messages, kind=RuntimeError)
        faults = Faults(failing)
        async with client_of(Watch(faults, frozenset(), reported.append)) as client:
            return await client.post("/", headers={"X-Request-ID": "mine"})

    answer = asyncio.run(once())
    assert answer.status_code == status
    assert [(one.status, one.failed) for one in reported] == [(status, 500 if messages else None)]
    assert "secret" not in answer.text
    *_, error = [part for part in answer.text.split("\n\n") if part and "[DONE]" not in part]
    told = json.loads(error.removeprefix("data: "))["error"]
    assert told["code"] == 500
    assert "request mine" in told["message"]
    assert answer.text.endswith("data: [DONE]\n\n") == bool(messages)
    assert "secret of the house" in caplog.text


def test_what_fails_while_a_request_is_read_is_the_requests_fault() -> None:
    async def once(reading: str, kind: type[Exception] = LookupError) -> httpx.Response:
        # As Starlette does: a 500 without a reason, and then the exception.
        failing = Failing("text/plain", 2, status=500, kind=kind)
        async with client_of(Faults(failing, (reading,))) as client:
            return await client.post("/")

    assert error_of(asyncio.run(once(__name__)), 400)["type"] == "BadRequestError"
    assert "log says why" in error_of(asyncio.run(once("elsewhere")), 500)["message"]
    # No request is at fault for these.
    for kind in (MemoryError, RuntimeError, OSError):
        assert "log says why" in error_of(asyncio.run(once(__name__, kind)), 500)["message"]


def test_an_answer_of_500_without_an_exception_stays_as_it_is() -> None:
    async def fails(_request: Request) -> Response:
        return JSONResponse({"error": {"code": 500, "message": "mine"}}, 500)

    async def once() -> httpx.Response:
        app = Starlette(routes=[Route("/", fails, methods=["POST"])])
        async with client_of(Faults(app)) as client:
            return await client.post("/")

    assert error_of(asyncio.run(once()), 500)["message"] == "mine"


def test_what_is_no_stream_of_events_is_cut() -> None:
    async def once() -> None:
        async with client_of(Faults(Failing("text/plain", 2))) as client:
            await client.post("/")

    with pytest.raises(ValueError, match="secret"):
        asyncio.run(once())


def test_the_openai_client_does_not_repeat_what_took_too_long() -> None:
    async def scenario() -> None:
        application = Application()
        app = Deadline(
            Starlette(routes=[Route("/v1/completions", application.wait, methods=["POST"])]), 1
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=3) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.completions.create(model="m", prompt="hi")
        assert caught.value.status_code == 408
        assert application.reached == 1
        server.should_exit = True
        await serving

    asyncio.run(scenario())
