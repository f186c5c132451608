"""What one request may ask for and how long it may take, and what each key may take."""

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
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from sliceserve.server import deadline
from sliceserve.server.arguments import Arguments
from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.bounds import EXPRESSION_CHARACTERS, STOP_CHARACTERS, Bounds, find_excess
from sliceserve.server.deadline import Deadline
from sliceserve.server.exchange import Exchange, Refusal, Watch
from sliceserve.server.faults import Faults
from sliceserve.server.per_key import KeyLimits, PerKey

BOUNDS = Bounds(sequences=6, output_tokens=100, stops=2)
HALF = {"type": "string", "pattern": "x" * (EXPRESSION_CHARACTERS // 2)}
FITTING = {"type": "object", "properties": {"a": HALF, "b": HALF}}
LONG = {"type": "object", "properties": {"a": HALF, "b": HALF, "c": {"pattern": "x"}}}


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"n": 6, "max_tokens": 100, "stop": ["a", "b"]}, None),
        ({"prompt": [1] * 50, "stop": "x" * STOP_CHARACTERS}, None),
        ({"n": None, "max_tokens": None, "stop": None, "prompt": None}, None),
        ({"n": [], "max_tokens": "many", "stop": 3, "prompt": {"a": 1}}, None),
        ({"max_tokens": float("nan"), "n": float("-inf")}, None),
        ({"messages": [{"role": "user", "content": "hi"}] * 50}, None),
        ({"n": 7}, "n"),
        ({"n": "7"}, "n"),
        ({"n": 7.0}, "n"),
        ({"n": 10**400}, "n"),
        ({"prompt": ["hi"] * 7}, "prompt"),
        ({"prompt": [[1, 2]] * 3, "n": 3}, "prompt"),
        ({"messages": [[{"role": "user", "content": "hi"}]] * 7}, "messages"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": "101"}, "max_completion_tokens"),
        ({"max_output_tokens": 1e30}, "max_output_tokens"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "x" * (STOP_CHARACTERS + 1)}, "stop"),
        ({"stop": [1, "x" * (STOP_CHARACTERS + 1)]}, "stop"),
        ({"sampling_params": {"n": 7}}, "n"),
        ({"sampling_params": {"max_tokens": 101}}, "max_tokens"),
        ({"sampling_params": [1]}, None),
        ({"items": ["a"] * 7}, "items"),
        ({"items": [[1]] * 6}, None),
        ({"stop_sequences": ["a", "b", "c"]}, "stop_sequences"),
        ({"response_format": {"json_schema": {"schema": FITTING}}}, None),
        ({"response_format": {"json_schema": {"schema": LONG}}}, "response_format"),
        ({"text": {"format": {"schema": LONG}}}, "text"),
        ({"tools": [{"function": {"parameters": LONG}}]}, "tools"),
        (
            {"structured_outputs": {"regex": "x" * (EXPRESSION_CHARACTERS + 1)}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"json": json.dumps(LONG)}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": json.dumps(LONG)}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, None),
        ({"response_format": {"patternProperties": {"x" * 20_000: {}}}}, "response_format"),
        ({"tools": [{"function": {"parameters": {"properties": {"pattern": {}}}}}]}, None),
    ],
)
def test_what_asks_too_much_is_named(given: dict[str, Any], argument: str | None) -> None:
    excess = find_excess(given, BOUNDS)
    assert (excess and excess.argument) == argument


def test_without_a_bound_answers_may_be_of_any_length() -> None:
    assert find_excess({"max_tokens": 10**9}, Bounds(1, None, 1)) is None


class Application:
    """Counts the requests that reach it, and whether one was left."""

    def __init__(self) -> None:
        self.reached = 0
        self.left = asyncio.Event()
        self.going = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        """Answer at once; ?tokens= are left where vLLM leaves them."""
        self.reached += 1
        if tokens := int(request.query_params.get("tokens", 0)):
            usage = type("Usage", (), {"prompt_tokens": tokens - 1, "completion_tokens": 1})
            request.state.request_metadata = type("Metadata", (), {"final_usage_info": usage})
        return JSONResponse({"model": "m"})

    async def wait(self, request: Request) -> Response:
        """Answer when it may, or notice as vLLM's routes do that the client left."""
        self.reached += 1
        await request.body()
        leaving = asyncio.ensure_future(request.receive())
        going = asyncio.ensure_future(self.going.wait())
        await asyncio.wait([leaving, going], return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            assert leaving.result()["type"] == "http.disconnect"
            self.left.set()
        return JSONResponse("late")

    async def stream(self, _request: Request) -> Response:
        async def parts() -> Any:
            try:
                for number in range(10**9):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0.01)
            finally:
                self.left.set()

        return StreamingResponse(parts(), media_type="text/event-stream")

    @property
    def app(self) -> Starlette:
        handlers = {"answer": self.answer, "wait": self.wait, "stream": self.stream}
        paths = {"/v1/completions": self.answer} | {f"/{k}": v for k, v in handlers.items()}
        return Starlette(
            routes=[
                Route(path, handler, methods=["GET", "POST"]) for path, handler in paths.items()
            ]
        )


def client_of(app: Any, key: str = "a") -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == status
    return error


def test_a_request_that_asks_too_much_does_not_reach_the_engine() -> None:
    async def scenario() -> None:
        application = Application()
        async with client_of(Arguments(application.app, BOUNDS)) as client:
            refused = await client.post("/answer", json={"model": "m", "n": 50})
            assert error_of(refused, 400)["param"] == "n"
            assert "50 sequences, and 6 are allowed" in error_of(refused, 400)["message"]
            assert application.reached == 0
            assert (await client.post("/answer", json={"n": 6})).json() == {"model": "m"}

    asyncio.run(scenario())


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
        faults = Faults(Failing("text/event-stream; charset=utf-8", messages))
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
    async def once(reading: str, kind: type[Exception] = ValueError) -> httpx.Response:
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


def limited(application: Application, limits: KeyLimits) -> tuple[Watch, list[Exchange]]:
    reported: list[Exchange] = []
    keys = KeyRing(["a", "b"])
    app = Auth(PerKey(application.app, limits), keys, frozenset())
    return Watch(app, frozenset(), reported.append), reported


def test_each_key_has_its_requests_at_a_time() -> None:
    async def scenario() -> None:
        application = Application()
        app, _ = limited(application, KeyLimits(2, None, None))
        async with client_of(app) as first, client_of(app, "b") as second:
            running = [asyncio.ensure_future(first.post("/wait")) for _ in range(2)]
            while application.reached < 2:
                await asyncio.sleep(0)
            refused = await first.post("/answer")
            assert "2 requests at work" in error_of(refused, 429)["message"]
            assert int(refused.headers["retry-after"]) == 1
            assert (await first.get("/answer")).status_code == 200
            assert (await second.post("/answer")).status_code == 200
            application.going.set()
            await asyncio.gather(*running)
            assert (await first.post("/answer")).status_code == 200

    asyncio.run(scenario())


def test_each_key_has_its_requests_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        application = Application()
        app, _ = limited(application, KeyLimits(None, 3, None))
        async with client_of(app) as first, client_of(app, "b") as second:
            answers = [await first.post("/answer") for _ in range(5)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
            assert "3 requests a minute" in error_of(answers[4], 429)["message"]
            assert 50 < int(answers[4].headers["retry-after"]) <= 60
            assert (await second.post("/answer")).status_code == 200
            began = time.time()
            monkeypatch.setattr(time, "time", lambda: began + 61)
            assert (await first.post("/answer")).status_code == 200

    asyncio.run(scenario())


def test_each_key_has_its_tokens_a_minute() -> None:
    async def scenario() -> None:
        application = Application()
        app, reported = limited(application, KeyLimits(None, None, 100))
        async with client_of(app) as first, client_of(app, "b") as second:
            answers = [await first.post("/answer?tokens=40") for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
            assert "100 tokens a minute" in error_of(answers[3], 429)["message"]
            assert [exchange.tokens for exchange in reported] == [40, 40, 40, 1]
            assert reported[3].refused is Refusal.KEY_TOKENS
            assert (await second.post("/answer?tokens=40")).status_code == 200

    asyncio.run(scenario())


def test_a_websocket_is_a_request_of_its_key() -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    routed = Starlette(routes=[WebSocketRoute("/v1/realtime", echo)])
    app = Auth(PerKey(routed, KeyLimits(2, 4, None)), KeyRing(["a", "b"]), frozenset())
    client = TestClient(Watch(app, frozenset()))

    def opened(key: str) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return client.websocket_connect("/v1/realtime", headers=headers)

    def refused(words: str) -> None:
        with pytest.raises(WebSocketDenialResponse) as caught, opened("a"):
            pass
        assert words in error_of(caught.value, 429)["message"]
        assert int(caught.value.headers["retry-after"]) > 0

    with opened("a") as first, opened("a"):
        refused("2 requests at work")
        with opened("b") as other:
            other.send_text("hi")
            assert other.receive_text() == "hi"
        first.send_text("there")
        assert first.receive_text() == "there"
    with opened("a"), opened("a"):
        pass
    refused("4 requests a minute")


def test_a_stream_that_is_left_costs_a_token_a_chunk() -> None:
    assert Exchange("1", "POST", 0.0, disconnected=True, chunks=7).tokens == 7
    known = Exchange("1", "POST", 0.0, prompt_tokens=3, generation_tokens=4, chunks=6)
    assert known.tokens == 7


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
