"""The status page in a real browser before a server that says what it likes, and its figures."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from browser import needs_chromium, opened
from playwright.sync_api import Error, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from test_report import VOID
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from sliceserve.server.auth import KeyRing
from sliceserve.server.health import Lifecycle, Phase, Readiness
from sliceserve.server.layering import Access, guarded
from sliceserve.server.live import LATENCIES_KEPT, LiveFigures
from sliceserve.server.responses import error_response

KEY = "key-of-alice"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
STATUS: dict[str, Any] = {
    "model": HOSTILE,
    "chat": True,
    "gpus": 2,
    "sliceserve": {
        "fraction": 0.1111, "width": 512, "hidden_size": 576, "rotations": f"60 {HOSTILE}",
        "parameters": 6_123_000_000, "dense_parameters": 7_000_000_000, "ratio": 0.8747,
        "dtype": "bfloat16", "source": "a-very-long-name-" * 20, "calibration": HOSTILE,
    },
    "uptime_seconds": 93_784.0,
    "requests_running": 3,
    "requests_waiting": 1234,
    "generation_tokens_per_second": 1234.56,
    "time_to_first_token_seconds": 0.0123,
    "time_per_output_token_seconds": None,
}  # fmt: skip
ENDLESS = "the stream stays open"
USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


async def status(_request: Request) -> JSONResponse:
    return JSONResponse(STATUS)


async def chat(request: Request) -> Any:
    """The events that the message lists, or else an error with it as its text."""
    body = await request.json()
    assert body["model"] == HOSTILE
    (message,) = body["messages"]
    if not message["content"].startswith("["):
        return error_response(400, "BadRequestError", message["content"])

    async def events() -> AsyncIterator[bytes]:
        listed = json.loads(message["content"])
        whole = "".join(f"data: {json.dumps(e)}\n\n" for e in listed if e != ENDLESS)
        # In pieces that end within characters and lines.
        for start in range(0, len(whole.encode()), 7):
            yield whole.encode()[start : start + 7]
        if ENDLESS in listed:
            await asyncio.Event().wait()

    return StreamingResponse(events(), media_type="text/event-stream")


@contextmanager
def answering(*keys: str) -> Iterator[str]:
    """The address of the page, before an application that stands for vLLM's."""
    routes = [
        Route("/status.json", status),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    lifecycle = Lifecycle()
    lifecycle.enter(Phase.SERVING, "answering requests")
    access = Access(KeyRing(keys), frozenset(), {})
    app = guarded(Starlette(routes=routes), access, Readiness(lifecycle))
    server = uvicorn.Server(uvicorn.Config(app, interface="asgi3", log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def address() -> Iterator[str]:
    with answering(KEY) as address:
        yield address


def unlock(page: Page, key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Open").click()


class Markup(HTMLParser):
    """What a policy concerns: inline style and script, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside: dict[str, str] = {"style": "", "script": ""}
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] += data


def test_the_headers_allow_what_is_in_the_page_and_nothing_else(address: str) -> None:
    answer = httpx.get(address, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    page = Markup(answer.text)
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in page.inside.items()
    }
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": f"'sha256-{hashes['script']}'",
        "style-src": f"'sha256-{hashes['style']}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    for name, value in page.attributes:
        assert name not in ("style", "src", "srcset", "action", "formaction"), name
        assert not name.startswith("on"), name
        assert name != "href" or value.startswith("data:"), value


def test_only_the_empty_page_is_open(address: str) -> None:
    assert httpx.head(address).status_code == 200
    for method, path in (
        ("POST", ""), ("OPTIONS", ""), ("GET", "/"), ("GET", "status.json"), ("GET", "status.js"),
        ("GET", "index.html"), ("GET", "data/status.js"), ("GET", "favicon.ico"),
    ):  # fmt: skip
        assert httpx.request(method, address + path, timeout=60).status_code == 401, (method, path)
    refused = httpx.get(f"{address}status.json", auth=("anyone", KEY), timeout=60)
    assert refused.status_code == 401, "no browser is asked to keep the key"
    assert refused.headers["www-authenticate"].startswith("Bearer ")
    with answering() as keyless:
        assert httpx.get(f"{keyless}status.json", timeout=60).json() == STATUS


@needs_chromium
def test_the_page_shows_what_the_server_says_as_text(address: str) -> None:
    with opened(address) as (page, complaints):
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        expect(page.locator("#phase")).to_have_text("serving")
        expect(page.locator("#content")).to_be_hidden()
        unlock(page)
        for name, text in {
            "model": HOSTILE,
            "rotations": f"60 {HOSTILE}",
            "ratio": "87.5 %",
            "parameters": "6.12 B",
            "dense": "7.00 B",
            "fraction": "11.1 %",
            "width": "512 of 576",
            "rate": "1,234.6",
            "running": "3",
            "waiting": "1,234",
            "first": "12.3 ms",
            "each": "–",
            "gpus": "2",
            "uptime": ", up 1 d 2 h",
        }.items():
            expect(page.locator(f"#{name}")).to_have_text(text)
        expect(page).to_have_title(f"{HOSTILE}: sliceserve")
        page.get_by_label("Message").fill(json.dumps([chunk(HOSTILE), chunk("é<b>\n"), USAGE]))
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#outcome")).to_have_text(
            re.compile(r"2 tokens in .+, the first after .+\.")
        )
        assert page.locator("#answer").text_content() == f"{HOSTILE}é<b>\n"
        assert page.locator("main img, main script, main b").count() == 0
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert complaints == []


@needs_chromium
def test_a_wrong_key_is_asked_for_again_by_the_keyboard_alone(address: str) -> None:
    with opened(address) as (page, complaints):
        page.keyboard.press("Tab")
        page.keyboard.type("guessed")
        page.keyboard.press("Enter")
        expect(page.locator("#refusal")).to_have_text("The API key is not valid.")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_be_focused()
        expect(page.locator("#unlock")).to_be_hidden()
        page.keyboard.press("Tab")
        page.keyboard.type(json.dumps([chunk("fine"), USAGE]))
        page.keyboard.press("Control+Enter")
        expect(page.locator("#answer")).to_have_text("fine")
        for name in ("limit", "send"):
            page.keyboard.press("Tab")
            expect(page.locator(f"#{name}")).to_be_focused()
        # More than one where the page asked by itself meanwhile.
        assert complaints
        assert [complaint for complaint in complaints if "401" not in complaint] == []


@needs_chromium
@pytest.mark.parametrize(
    ("message", "answer", "outcome"),
    [
        ("there is <b>no</b> room", "", "there is <b>no</b> room"),
        (json.dumps([chunk("half"), {"error": {"message": "it died"}}]), "half", "it died"),
        (json.dumps([chunk("half")]), "half", "The answer ended early."),
    ],
)
def test_what_goes_wrong_is_told(address: str, message: str, answer: str, outcome: str) -> None:
    with opened(address) as (page, _):
        unlock(page)
        page.get_by_label("Message").fill(message)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#outcome")).to_have_text(outcome)
        assert page.locator("#answer").text_content() == answer
        expect(page.get_by_role("button", name="Send")).to_be_visible()


@needs_chromium
def test_an_answer_without_an_end_can_be_stopped(address: str) -> None:
    with opened(address) as (page, complaints):
        unlock(page)
        page.get_by_label("Message").fill(json.dumps([chunk("half"), ENDLESS]))
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer")).to_have_text("half")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#outcome")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        assert page.locator("#answer").text_content() == "half"
        page.get_by_label("Message").fill(json.dumps([chunk("whole"), USAGE]))
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer")).to_have_text("whole")
        assert complaints == []


@needs_chromium
def test_a_phone_shows_the_page_in_its_width_and_takes_touches(address: str) -> None:
    with sync_playwright() as playwright:
        phone = playwright.devices["Pixel 7"]
    with opened(address, **phone) as (page, complaints):
        assert page.evaluate("matchMedia('(pointer: coarse)').matches")
        page.get_by_label("API key").tap()
        page.keyboard.type(KEY)
        page.get_by_role("button", name="Open").tap()
        page.get_by_label("Message").tap()
        page.keyboard.type(json.dumps([chunk("fine"), USAGE]))
        page.get_by_role("button", name="Send").tap()
        expect(page.locator("#answer")).to_have_text("fine")
        # Without a viewport of the device's width it would be laid out 980 pixels wide.
        width = phone["viewport"]["width"]
        assert page.evaluate("innerWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert complaints == []


@needs_chromium
def test_a_server_that_is_gone_is_told() -> None:
    with ExitStack() as server, opened(server.enter_context(answering())) as (page, _):
        expect(page.locator("#running")).to_have_text("3")
        expect(page.locator("#unlock")).to_be_hidden()
        server.close()
        expect(page.locator("#phase")).to_have_text("failing: the server does not answer")
        expect(page.locator("#running")).to_have_text("–")
        expect(page.locator("#uptime")).to_be_empty()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_axe_finds_nothing(address: str, width: int, scheme: str) -> None:
    size = {"width": width, "height": 740}
    with opened(address, viewport=size, color_scheme=scheme, reduced_motion="reduce") as (page, _):
        for _ in range(2):
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") == width
            if page.locator("#unlock").is_visible():
                unlock(page)
                page.get_by_label("Message").fill(json.dumps([chunk("word" * 200), USAGE]))
                page.get_by_role("button", name="Send").click()
                expect(page.locator("#outcome")).not_to_be_empty()
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 50) == (scheme == "dark")
        assert page.evaluate("document.getAnimations().length") == 0


@needs_chromium
@pytest.mark.parametrize(
    ("attempt", "complaint"),
    [
        ("document.body.innerHTML = '<b>'", "requires 'TrustedHTML' assignment"),
        ("fetch('http://localhost:1/')", "connect-src 'self'"),
        ("import('data:text/javascript,1')", "script-src 'sha256-"),
        ("document.body.setAttribute('style', 'color: red')", "style-src 'sha256-"),
        ("document.body.append(Object.assign(new Image(), {src: '/a.png'}))", "img-src data:"),
        ("document.forms[0].submit()", "form-action 'none'"),
    ],
)
def test_the_browser_enforces_the_policy(address: str, attempt: str, complaint: str) -> None:
    with opened(address) as (page, _):
        # It raises if there is no such message.
        expected = page.expect_console_message(lambda message: complaint in message.text)
        with expected, suppress(Error):
            page.evaluate(attempt)
        assert page.url == address


def test_the_live_figures_are_of_their_windows() -> None:
    now = 1000.5
    live = LiveFigures(lambda: now)
    assert set(live.describe().values()) == {None}
    loggers = [live.stat_logger(None, engine) for engine in (0, 1)]
    assert live.describe()["requests_running"] == 0

    def step(tokens: int, firsts: list[float], each: list[tuple[int, float]]) -> None:
        stats = IterationStats()
        stats.num_generation_tokens = tokens
        stats.time_to_first_tokens_iter = firsts
        stats.finished_requests = [
            SimpleNamespace(num_generation_tokens=length, mean_time_per_output_token=seconds)
            for length, seconds in each
        ]
        loggers[1].record(None, stats, engine_idx=1)

    for engine, logger in enumerate(loggers):
        queues = SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, num_skipped_waiting_reqs=1)
        logger.record(queues, None, engine_idx=engine)
    assert live.describe()["requests_running"] == 6
    assert live.describe()["requests_waiting"] == 6

    step(7, [0.1, 0.4], [(5, 0.02), (1, 0.0)])
    step(3, [0.2], [])
    assert live.describe()["generation_tokens_per_second"] == 0, "its second is not over"
    now = 1001.0
    assert live.describe()["generation_tokens_per_second"] == 1.0
    assert live.describe()["time_to_first_token_seconds"] == 0.2
    assert live.describe()["time_per_output_token_seconds"] == 0.02, "one token has no gap"
    now = 1010.9
    step(20, [], [])
    assert live.describe()["generation_tokens_per_second"] == 1.0
    now = 1011.0
    assert live.describe()["generation_tokens_per_second"] == 2.0
    now = 1060.5
    assert live.describe()["time_to_first_token_seconds"] == 0.2
    now = 1060.6
    assert live.describe()["time_to_first_token_seconds"] is None
    assert live.describe()["generation_tokens_per_second"] == 0
    step(0, [1.0] * LATENCIES_KEPT, [])
    step(0, [9.0] * (LATENCIES_KEPT // 2 + 1), [])
    assert live.describe()["time_to_first_token_seconds"] == 9.0, "of the latest"
