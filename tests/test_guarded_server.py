"""The whole server: starting, serving with keys, hung, draining, its engine killed."""

import hashlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import told_engine
from browser import needs_chromium, opened
from playwright.sync_api import expect
from server_process import (
    STOP_SECONDS,
    ServerProcess,
    post,
    sample,
    scraped_to_its_end,
    serving,
    stopped,
    stream,
)

KEY, OTHER_KEY, FIXED_KEY = "key-of-alice", "key-of-bob", "key-from-environment"
QUEUED_TOKENS = 400
ANTHROPIC = r"\[(api_router|vllm_compat)\.py:"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n")
    return file


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files tell the engine what to do: not to end its start, at first."""
    directory = told_engine.installed(tmp_path_factory.mktemp("engine"))
    (directory / "hold").touch()
    return directory


@pytest.fixture(scope="module")
def starting(
    tiny_sliced: Path, key_file: Path, engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that nobody has waited for, and that loads the model until it is let."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    template = log.with_name("template.jinja")
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}\n")
    options = ["--probe-timeout", "5", "--drain-timeout", "100", "--metrics-public"]
    options += ["--max-sequences", "4", "--max-output-tokens", "500", "--key-max-requests", "5"]
    options += ["--max-queued-tokens", str(QUEUED_TOKENS)]
    # As the status page leaves the temperature to the server.
    options += ["--override-generation-config", '{"temperature": 0}']
    with serving(
        tiny_sliced,
        log,
        *(*options, "--api-key-file", str(key_file), "--chat-template", str(template)),
        SLICESERVE_API_KEY=f"{FIXED_KEY},another",
        PYTHONPATH=str(engine),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def server(starting: ServerProcess, engine: Path) -> ServerProcess:
    (engine / "hold").unlink()
    starting.wait_for("/readyz", 200)
    return starting


def get(server: ServerProcess, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=30)


def keys_in(text: str) -> list[str]:
    """Those that clients have shown, the wrong ones too."""
    return [key for key in (KEY, OTHER_KEY, FIXED_KEY, "guessed") if key in text]


def test_it_answers_while_the_model_loads(starting: ServerProcess) -> None:
    alive = starting.wait_for("/livez", 200)
    assert alive.json()["status"] == "starting"
    assert alive.json()["step"] in ("reading the options", "loading the model")
    ready = get(starting, "/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "starting")
    assert get(starting, "/v1/models").status_code == 401
    loading = get(starting, "/v1/models", KEY)
    assert loading.status_code == 503
    assert "loading" in loading.json()["error"]["message"]
    assert int(loading.headers["retry-after"]) > 0
    assert "API key" in get(starting, "/").text


def test_every_route_of_the_running_server_needs_a_key(server: ServerProcess) -> None:
    description = get(server, "/openapi.json", KEY).json()
    routes = [
        (method, path)
        for path, operations in description["paths"].items()
        for method in operations
        if path != "/metrics"
    ]
    paths = {path for _, path in routes}
    assert {"/v1/models", "/tokenize", "/invocations", "/health"} <= paths
    assert not [path for path in paths if "elastic" in path], "these restart the engines"
    closed = httpx.post(
        f"{server.url}/scale_elastic_ep", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert closed.status_code == 404
    routes += [("get", path) for path in ("/status.json", "/docs", "/openapi.json", "/no/such")]
    for method, path in routes:
        answer = httpx.request(method, f"{server.url}{path}", timeout=30)
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["code"] == 401
    assert "vllm:num_requests_running" in get(server, "/metrics").text


def test_what_the_router_refuses_is_an_openai_error(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {FIXED_KEY}", "Content-Type": "application/json"}
    for method, path, body, status in (
        ("GET", "/no/such", b"", 404),
        ("PUT", "/v1/models", b"", 405),
        ("POST", "/tokenize", b"\xff\x00", 400),
    ):
        answer = httpx.request(
            method, f"{server.url}{path}", content=body, headers=headers, timeout=60
        )
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status
        assert answer.json()["error"]["message"]
        assert ("GET" in answer.headers.get("allow", "")) == (status == 405)


def test_the_openai_client_is_told_what_is_wrong(server: ServerProcess) -> None:
    good = openai.OpenAI(base_url=f"{server.url}/v1", api_key=FIXED_KEY, max_retries=0)
    assert [model.id for model in good.models.list()] == ["sliced"]
    bad = openai.OpenAI(base_url=f"{server.url}/v1", api_key="guessed", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        bad.models.list()
    assert "not valid" in str(caught.value)
    assert "guessed" not in str(caught.value)


def test_a_websocket_without_a_key_is_refused(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"GET /v1/realtime HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_keys_rotate_without_a_restart(server: ServerProcess, key_file: Path) -> None:
    assert get(server, "/v1/models", KEY).status_code == 200
    assert get(server, "/v1/models", OTHER_KEY).status_code == 401
    replacement = key_file.with_name("new")
    replacement.write_text(f"{OTHER_KEY}\n")
    replacement.rename(key_file)
    assert get(server, "/v1/models", KEY).status_code == 401
    assert get(server, "/v1/models", OTHER_KEY).status_code == 200


def test_browsers_of_other_origins_get_no_permission(server: ServerProcess) -> None:
    headers = {"Origin": "https://a.example", "Authorization": f"Bearer {FIXED_KEY}"}
    answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


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


MESSAGES = [{"role": "user", "content": "x" * 150}]


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
