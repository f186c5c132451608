"""The layers round vLLM's application, in one process with httpx."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sliceserve.server import layering
from sliceserve.server.app import access_of
from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.drain import Drain
from sliceserve.server.health import EngineProbe, Health, Lifecycle, Phase, Readiness
from sliceserve.server.layering import Access, still_starting
from sliceserve.server.serve import make_parser, parse_arguments

ORIGIN = "https://a.example"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


async def secret(_request: Any) -> PlainTextResponse:
    return PlainTextResponse("secret")


def everything() -> Starlette:
    """An application that answers any path."""
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", secret, methods=methods)])


def ask(app: Any, method: str, path: str, **headers: str | bytes) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(once())


def status(app: Any, key: str) -> int:
    return ask(app, "GET", "/v1/models", Authorization=f"Bearer {key}").status_code


def guarded(keys: KeyRing, *public: str) -> Auth:
    return Auth(everything(), keys, frozenset(public))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/metrics/"),
        ("POST", "/open"),
        ("GET", "/open/"),
        ("GET", "/OPEN"),
        ("GET", "//open"),
        ("GET", "/open/../v1/models"),
        ("GET", "/livez"),
        ("OPTIONS", "/v1/models"),
        ("POST", "/tokenize"),
    ],
)
def test_every_route_is_closed_but_those_named(method: str, path: str) -> None:
    app = guarded(KeyRing(["key"]), "/open")
    assert ask(app, method, path, **PREFLIGHT).status_code == 401
    assert ask(app, method, path, Authorization="bearer key").text == "secret"
    assert ask(app, "GET", "/open").text == "secret"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "key", "Basic key", "Bearer kez", "Bearer keyy", "Bearer key key",
     "Bearer ke", b"Bearer \xe9"],
)  # fmt: skip
def test_a_wrong_key_gets_an_openai_error(header: str | bytes) -> None:
    answer = ask(guarded(KeyRing(["key"])), "GET", "/v1/models", Authorization=header)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer realm="sliceserve"')
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)
    assert "key" in error["message"].lower()
    assert "kez" not in answer.text


def test_a_websocket_needs_a_key() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(guarded(KeyRing(["key"]), "/v1/realtime")(scope, receive, send))
    assert sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 401


def test_a_preflight_passes_only_where_cross_origin_requests_are_allowed() -> None:
    access = (
        Access(KeyRing(["key"]), frozenset(), cross_origin)
        for cross_origin in ({}, {"allow_origins": [ORIGIN]})
    )
    closed, opened = (layering.guarded(everything(), one, Readiness(Lifecycle())) for one in access)
    refused = ask(closed, "OPTIONS", "/v1/models", **PREFLIGHT)
    assert refused.status_code == 401
    assert "access-control-allow-origin" not in refused.headers
    answer = ask(opened, "OPTIONS", "/v1/models", **PREFLIGHT)
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.text != "secret"
    assert ask(opened, "OPTIONS", "/v1/models", Origin=ORIGIN).status_code == 401
    refused = ask(opened, "GET", "/v1/models", **PREFLIGHT)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN  # so that a page may read it
    allowed = ask(opened, "GET", "/v1/models", Origin=ORIGIN, Authorization="Bearer key")
    assert allowed.text == "secret"


def test_vllms_options_say_which_origins_may_call_while_the_model_loads_too() -> None:
    argv = ["DIR", "--host", "127.0.0.1", "--allowed-origins", f'["{ORIGIN}"]']
    args, settings = parse_arguments(make_parser(), argv)
    app = layering.guarded(still_starting, access_of(settings, args), Readiness(Lifecycle()))
    answer = ask(app, "GET", "/v1/models", Origin=ORIGIN)
    assert answer.status_code == 503
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    other = ask(app, "GET", "/v1/models", Origin="https://b.example")
    assert "access-control-allow-origin" not in other.headers


def test_the_key_file_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vllm.sliceserve")
    file = tmp_path / "keys"
    file.write_text("# of today\nold-key\n\nother-key\n")
    app = guarded(KeyRing(["fixed"], file))
    assert [status(app, key) for key in ("fixed", "old-key", "other-key")] == [200, 200, 200]
    replacement = tmp_path / "new"
    replacement.write_text("new-key\n")
    replacement.replace(file)
    assert [status(app, key) for key in ("fixed", "old-key", "new-key")] == [200, 401, 200]
    # Unusable: nothing is locked out, nothing new is let in.
    file.write_text("broken key\n")
    assert [status(app, key) for key in ("broken key", "new-key")] == [401, 200]
    file.unlink()
    assert [status(app, key) for key in ("fixed", "new-key")] == [200, 200]
    # Emptied on purpose: its keys are gone, and the server does not open up.
    file.write_text("")
    assert [status(app, key) for key in ("fixed", "new-key", "")] == [200, 401, 401]
    assert "was read again" in caplog.text
    assert not [key for key in ("old-key", "new-key", "broken key") if key in caplog.text]


def test_emptying_the_only_source_of_keys_closes_the_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    keys = KeyRing(file=file)
    app = guarded(keys)
    assert status(app, "key") == 200
    file.write_text("")
    assert status(app, "key") == 401
    assert keys


@pytest.mark.parametrize(
    ("phase", "livez", "readyz"),
    [
        (Phase.STARTING, 200, 503),
        (Phase.SERVING, 200, 200),
        (Phase.DRAINING, 200, 503),
        (Phase.FAILING, 503, 503),
    ],
)
def test_the_phases_as_an_orchestrator_sees_them(phase: Phase, livez: int, readyz: int) -> None:
    async def fine() -> None:
        assert phase is Phase.SERVING, "there is nobody to ask"

    lifecycle = Lifecycle()
    lifecycle.enter(phase, "this and that")
    app = Health(everything(), Readiness(lifecycle, EngineProbe(fine, 1)))
    for path, expected in (("/livez", livez), ("/readyz", readyz)):
        answer = ask(app, "GET", path)
        assert answer.status_code == expected
        assert answer.json().items() >= {"status": phase.value, "step": "this and that"}.items()
        assert ("retry-after" in answer.headers) == (expected == 503)
        assert ask(app, "HEAD", path).status_code == expected
    assert ask(app, "POST", "/livez").text == ask(app, "GET", "/livez/").text == "secret"


def test_a_hung_engine_is_found_out_by_one_question() -> None:
    questions: list[asyncio.Event] = []

    async def hang() -> None:
        questions.append(asyncio.Event())
        await questions[-1].wait()

    async def scenario() -> None:
        probe = EngineProbe(hang, 0.1)
        problems = await asyncio.gather(*(probe.check() for _ in range(20)))
        assert all(problem and "has not answered" in problem for problem in problems)
        assert await probe.check()
        assert len(questions) == 1
        questions[0].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # It answered late; the next question decides.
        assert "has not answered" in str(await probe.check())
        assert len(questions) == 2

    asyncio.run(scenario())


def test_a_dead_engine_fails_both_probes() -> None:
    async def dead() -> None:
        raise RuntimeError("with internal details")

    lifecycle = Lifecycle()
    lifecycle.enter(Phase.SERVING, "answering requests")
    app = Health(everything(), Readiness(lifecycle, EngineProbe(dead, 1)))
    for path in ("/livez", "/readyz"):
        answer = ask(app, "GET", path)
        assert answer.status_code == 503
        assert answer.json()["step"] == "the engine is dead"


def test_an_engine_hangs_when_one_question_has_no_answer_for_long() -> None:
    async def scenario() -> None:
        answers, asked = asyncio.Semaphore(3), 0

        async def ask() -> None:
            nonlocal asked
            asked += 1
            await answers.acquire()

        began = asyncio.get_running_loop().time()
        await EngineProbe(ask, 0.1).wait_until_hung(0.5)
        assert asked == 4
        # Three were answered, a pause after each.
        assert asyncio.get_running_loop().time() - began >= 3 * 0.1 + 0.5

    asyncio.run(scenario())


def test_a_drain_lets_running_requests_end_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        going, hurry = asyncio.Event(), asyncio.Event()

        async def slow(_request: Any) -> PlainTextResponse:
            await going.wait()
            return PlainTextResponse("done")

        lifecycle = Lifecycle()
        lifecycle.enter(Phase.SERVING, "answering requests")
        routes = [Route("/slow", slow), Route("/metrics", secret), Route("/error", fail)]
        drain = Drain(Starlette(routes=routes), lifecycle, going.set)
        transport = httpx.ASGITransport(app=drain, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/error")).status_code == 500
            assert drain.running == 0
            slow_answers = [asyncio.ensure_future(client.get("/slow")) for _ in range(3)]
            while drain.running < 3:
                await asyncio.sleep(0)
            lifecycle.enter(Phase.DRAINING, "waiting")
            refused = await client.get("/slow")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            assert refused.json()["error"]["code"] == 503
            assert (await client.get("/metrics")).text == "secret"
            assert await drain.wait(0.05, hurry) == 3
            hurry.set()
            assert await drain.wait(1000, hurry) == 3
            waiting = asyncio.ensure_future(drain.wait(1000, asyncio.Event()))
            slow_answers[0].cancel()  # a client that disconnects
            going.set()
            assert await waiting == 0
            assert [(await answer).text for answer in slow_answers[1:]] == ["done", "done"]

    asyncio.run(scenario())


async def fail(_request: Any) -> PlainTextResponse:
    raise RuntimeError
