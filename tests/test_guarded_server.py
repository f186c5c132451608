"""A server with keys: what it tells, what it bounds, hung, draining, and its log afterwards."""

import hashlib
import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import needs_chromium, opened
from guarded import FIXED_KEY, QUEUED_TOKENS, get, keys_in
from playwright.sync_api import expect
from server_process import (
    STOP_SECONDS,
    ServerProcess,
    post,
    sample,
    scraped_to_its_end,
    stopped,
    stream,
)

MESSAGES = [{"role": "user", "content": "x" * 150}]
ANTHROPIC = r"\[(api_router|vllm_compat)\.py:"


@pytest.fixture
def server(guarded: ServerProcess) -> ServerProcess:
    return guarded


@pytest.fixture
def engine(guarded_engine: Path) -> Path:
    return guarded_engine


def status_of(server: ServerProcess) -> Any:
    return get(server, "/status.json", FIXED_KEY).json()


def test_the_status_has_what_other_routes_say(server: ServerProcess) -> None:
    found = status_of(server)
    (model,) = get(server, "/v1/models", FIXED_KEY).json()["data"]
    assert (found["model"], found["sliceserve"]) == (model["id"], model["sliceserve"])
    assert found["gpus"] == sample(server, "sliceserve_gpus") == 0
    assert found["chat"] is True
    assert found["uptime_seconds"] > 0


def wait_for_status(server: ServerProcess, wanted: Callable[[Any], bool]) -> None:
    """Wait for figures, which may follow the answer that they are of."""
    deadline = time.monotonic() + STOP_SECONDS
    while not wanted(found := status_of(server)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def wait_for_sample(server: ServerProcess, name: str, wanted: float) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while (found := sample(server, name)) != wanted:
        assert time.monotonic() < deadline, (name, found)
        time.sleep(0.05)


def test_the_status_counts_what_runs(server: ServerProcess, engine: Path) -> None:
    # Else the answer could be over before the status is asked for.
    (engine / "slow").touch()
    with stream(server, FIXED_KEY, tokens=450) as answer:
        assert answer.status_code == 200
        wait_for_status(
            server,
            lambda now: (
                (now["requests_running"], now["requests_waiting"]) == (1, 0)
                and now["generation_tokens_per_second"] > 0
            ),
        )
    (engine / "slow").unlink()
    assert post(server, FIXED_KEY).status_code == 200
    wait_for_status(
        server,
        lambda now: (
            now["requests_running"] == 0
            and now["time_to_first_token_seconds"]
            and now["time_per_output_token_seconds"]
        ),
    )


@needs_chromium
def test_a_browser_chats_with_the_model(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "hi <b>you</b>"}]
    whole = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "sliced", "messages": messages, "max_tokens": 20},
        headers={"Authorization": f"Bearer {FIXED_KEY}"},
        timeout=60,
    ).json()
    with opened(f"{server.url}/") as (page, complaints):
        page.get_by_label("API key").fill(FIXED_KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("sliced")
        page.get_by_label("Message").fill(messages[0]["content"])
        page.get_by_label("Tokens at most").fill("20")
        page.get_by_role("button", name="Send").click()
        tokens = whole["usage"]["completion_tokens"]
        expect(page.locator("#outcome")).to_contain_text(f"{tokens} tokens in", timeout=60_000)
        text = page.locator("#answer").text_content()
        assert text == whole["choices"][0]["message"]["content"] != ""
        assert complaints == []


def test_a_hang_is_found_out_and_passes(server: ServerProcess) -> None:
    server.wait_for("/livez", 200)
    with stopped(server.engine()):
        for path in ("/livez", "/readyz"):
            answer = get(server, path)
            assert answer.status_code == 503
            assert "has not answered" in answer.json()["step"]
        # vLLM's own answer, which is why there is ours.
        assert get(server, "/health", FIXED_KEY).status_code == 200
    server.wait_for("/readyz", 200)


def test_a_client_that_leaves_frees_the_engine(server: ServerProcess) -> None:
    before = sample(server, "vllm:generation_tokens_total")
    with stopped(server.engine()):
        with ExitStack() as streams:
            for _ in range(3):
                streams.enter_context(stream(server, FIXED_KEY, tokens=500))
        wait_for_sample(server, "sliceserve_running_requests", 0)
    # The gauges are those of the last step, so there must be one.
    with stream(server, FIXED_KEY, tokens=1) as last:
        assert list(last.iter_lines())
    for gauge in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        wait_for_sample(server, gauge, 0)
    assert sample(server, "vllm:generation_tokens_total") - before < 3 * 500


@pytest.fixture(scope="module")
def told_usage() -> dict[str, dict[str, int]]:
    """The tokens that answers tell, by the id of their requests."""
    return {}


def test_a_request_id_comes_back_and_names_the_answer(
    server: ServerProcess, told_usage: dict[str, dict[str, int]]
) -> None:
    body = {"model": "sliced", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    for key, status in ((FIXED_KEY, 200), ("wrong", 401)):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}", "X-Request-ID": f"mine-{status}"},
            timeout=60,
        )
        assert answer.status_code == status
        assert answer.headers.get_list("x-request-id") == [f"mine-{status}"]
        if status == 200:
            assert answer.json()["id"] == "cmpl-mine-200"
            assert answer.json()["usage"]["completion_tokens"] == 3
    for name, streamed in (("whole", False), ("streamed", True)):
        answer = httpx.post(
            f"{server.url}/v1/responses",
            json={"model": "sliced", "input": "hi", "max_output_tokens": 4, "stream": streamed},
            headers={"Authorization": f"Bearer {FIXED_KEY}", "X-Request-ID": f"mine-{name}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        # Compared with the log below: vLLM does not tell our layers the tokens of this route.
        last = answer.text.strip().splitlines()[-1].removeprefix("data: ")
        response = json.loads(last)["response"] if streamed else answer.json()
        told_usage[f"mine-{name}"] = response["usage"]
    made = {get(server, path, FIXED_KEY).headers["x-request-id"] for path in ("/livez", "/health")}
    assert len(made) == 2


@pytest.mark.parametrize(
    ("asked", "argument"),
    [({"n": 5}, "n"), ({"prompt": ["hi"] * 5}, "prompt"), ({"max_tokens": 501}, "max_tokens")],
)
def test_what_asks_too_much_is_refused(
    server: ServerProcess, asked: dict[str, Any], argument: str
) -> None:
    answer = post(server, FIXED_KEY, **asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == argument


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("completions", {"prompt": "hi", "max_tokens": 2, "logprobs": None}),
        (
            "chat/completions",
            {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": None},
        ),
        (
            "responses",
            {
                "input": "hi",
                "max_output_tokens": 2,
                "include": ["message.output_text.logprobs"],
                "top_logprobs": None,
            },
        ),
    ],
)
def test_who_asks_for_too_many_logprobs_is_refused(
    server: ServerProcess, route: str, asked: dict[str, Any], streamed: bool
) -> None:
    for number, status in ((5, 200), (6, 400)):
        body = {name: number if value is None else value for name, value in asked.items()}
        answer = httpx.post(
            f"{server.url}/v1/{route}",
            json={"model": "sliced", "stream": streamed} | body,
            headers={"Authorization": f"Bearer {FIXED_KEY}"},
            timeout=60,
        )
        assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["param"].endswith("logprobs")
    assert "is 6, and 5 logprobs are allowed" in error["message"]


def test_who_names_no_number_of_tokens_gets_no_more_than_the_bound(server: ServerProcess) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "sliced"} | asked,
        headers={"Authorization": f"Bearer {FIXED_KEY}"},
        timeout=120,
    )
    assert answer.json()["usage"]["completion_tokens"] == 500


def test_a_key_has_its_requests_at_a_time(server: ServerProcess) -> None:
    with ExitStack() as streams, stopped(server.engine()):
        for _ in range(5):
            streams.enter_context(stream(server, FIXED_KEY, tokens=1))
        refused = post(server, FIXED_KEY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert get(server, "/ping", "another").status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("completions", {"prompt": "x" * 150}),
        ("completions", {"prompt": "x" * 40, "n": 4, "temperature": 1}),
        ("completions", {"prompt": ["x" * 50] * 3}),
        ("chat/completions", {"messages": MESSAGES}),
        ("responses", {"input": MESSAGES}),
        ("messages", {"messages": MESSAGES, "max_tokens": 5}),
    ],
)
def test_a_prompt_that_would_wait_behind_too_many_tokens_is_refused(
    server: ServerProcess, route: str, asked: dict[str, Any], streamed: bool
) -> None:
    before = rejected_for_tokens(server)
    with stopped(server.engine()), stream(server, FIXED_KEY, tokens=1, prompt="y" * 300) as first:
        assert first.status_code == 200
        assert sample(server, "sliceserve_queued_prompt_tokens") >= 300
        refused = httpx.post(
            f"{server.url}/v1/{route}",
            json={"model": "sliced", "stream": streamed} | asked,
            headers={"Authorization": f"Bearer {FIXED_KEY}"},
            timeout=60,
        )
        assert refused.status_code == 429, refused.text
        assert refused.json()["error"]["type"] == "RateLimitError"
        assert str(QUEUED_TOKENS) in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert rejected_for_tokens(server) == before + 1
        # What still has room: nothing of the refused request is left in the queue.
        with stream(server, FIXED_KEY, tokens=1, prompt="x" * 80) as second:
            assert second.status_code == 200
    server.wait_for("/readyz", 200)


def rejected_for_tokens(server: ServerProcess) -> int:
    found = re.search(
        r'rejected_total{.*reason="queued_tokens"} (\d+)', get(server, "/metrics").text
    )
    assert found
    return int(found[1])


def test_a_request_that_waits_alone_has_room_and_leaving_gives_it_back(
    server: ServerProcess,
) -> None:
    assert post(server, FIXED_KEY, prompt="x" * 150, n=4, temperature=1).status_code == 200
    assert post(server, FIXED_KEY, prompt=["x" * 150] * 4).status_code == 200
    with stopped(server.engine()):
        with stream(server, FIXED_KEY, tokens=1, prompt="y" * 450) as answer:
            assert answer.status_code == 200
        wait_for_sample(server, "sliceserve_queued_prompt_tokens", 0)
        with stream(server, FIXED_KEY, tokens=1, prompt="z" * 300) as answer:
            assert answer.status_code == 200
    assert post(server, FIXED_KEY).status_code == 200
    assert sample(server, "sliceserve_queued_prompt_tokens") == 0


def test_a_huge_body_is_refused(server: ServerProcess) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=b" " * (5 * 2**20),
        headers={"Authorization": f"Bearer {FIXED_KEY}"},
        timeout=60,
    )
    assert answer.status_code == 413
    assert "4194304 bytes" in answer.json()["error"]["message"]


def test_a_slow_body_is_refused(server: ServerProcess) -> None:
    with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as sender:
        sender.putrequest("POST", "/v1/completions")
        sender.putheader("Authorization", f"Bearer {FIXED_KEY}")
        sender.putheader("Content-Length", "100")
        sender.endheaders(b"{")
        answer = sender.getresponse()
        assert (answer.status, answer.getheader("connection")) == (408, "close")
        assert "within 5 s" in json.loads(answer.read())["error"]["message"]


def test_keys_are_not_handed_to_the_processes_of_vllm(server: ServerProcess) -> None:
    environment = Path(f"/proc/{server.engine()}/environ").read_bytes()
    assert b"VLLM_CPU_KVCACHE_SPACE=1" in environment
    assert FIXED_KEY.encode() not in environment


def test_sigterm_drains_and_ends_with_0(server: ServerProcess) -> None:
    with ExitStack() as answers:
        with stopped(server.engine()):
            answer = answers.enter_context(stream(server, FIXED_KEY, tokens=400))
            assert answer.status_code == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for("/readyz", 503).json()["status"] == "draining"
            assert get(server, "/livez").status_code == 200
            refused = get(server, "/v1/models", FIXED_KEY)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert get(server, "/v1/models").status_code == 401
            assert get(server, "/status.json", "guessed").status_code == 401
            assert "API key" in get(server, "/").text
            metrics = get(server, "/metrics").text
            assert keys_in(metrics) == []
            assert status_of(server)["model"] == "sliced"
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-3]
    assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 400
    for route, status in (("/v1/models", 503), ("/v1/models", 401), ("/v1/completions", 413)):
        assert f'route="{route}",status="{status}"' in metrics
    assert 'route="/v1/completions",status="disconnected"' in metrics
    assert scraped_to_its_end(server, FIXED_KEY) == 0, server.log.read_text()


def test_every_request_has_a_line_in_the_log(
    server: ServerProcess, told_usage: dict[str, dict[str, int]]
) -> None:
    text = server.log.read_text().splitlines()
    lines = [json.loads(line) for line in text if line.startswith('{"time"')]
    found = {(line["route"], line["status"], line["disconnected"]) for line in lines}
    assert found >= {
        ("/readyz", 503, False),
        ("/", 200, False),
        ("/status.json", 401, False),
        ("/v1/models", 200, False),
        ("/v1/models", 401, False),
        ("/v1/models", 503, False),
        ("/v1/completions", 408, False),
        ("/v1/completions", 413, False),
        ("/v1/completions", 200, True),
    }
    assert ("/status.json", 200, False) not in found
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    (named, refused) = (by_id[f"mine-{status}"] for status in (200, 401))
    assert named["key"] == hashlib.sha256(FIXED_KEY.encode()).hexdigest()[:8]
    assert (named["model"], named["generation_tokens"]) == ("sliced", 3)
    assert refused["key"] is refused["model"] is refused["generation_tokens"] is None
    assert told_usage.keys() == {"mine-whole", "mine-streamed"}
    for name, usage in told_usage.items():
        assert by_id[name]["prompt_tokens"] == usage["input_tokens"] > 0
        assert by_id[name]["generation_tokens"] == usage["output_tokens"] > 0
    left = [line for line in lines if line["disconnected"] and line["route"] == "/v1/completions"]
    assert left
    assert all(line["prompt_tokens"] > 0 for line in left)
    (drained,) = [line for line in lines if line["generation_tokens"] == 400]
    assert drained["prompt_tokens"] == named["prompt_tokens"] > 0
    assert 0 < drained["first_byte_seconds"] < drained["seconds"]


def test_no_key_was_ever_logged(server: ServerProcess) -> None:
    log = server.log.read_text()
    assert "401" in log
    assert keys_in(log) == []
    # Of vLLM's Anthropic route every refusal of the engine is logged with one; of 0.24 by us.
    others = [line for line in log.splitlines() if not re.search(ANTHROPIC, line)]
    assert not [line for line in others if "Traceback" in line]
