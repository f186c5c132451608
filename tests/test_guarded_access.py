"""A server with keys: while it starts, who it lets in, and what it says to those it does not."""

import socket
from pathlib import Path

import httpx
import openai
import pytest
from guarded import FIXED_KEY, KEY, OTHER_KEY, get
from server_process import ServerProcess


def test_it_answers_while_the_model_loads(guarded_start: ServerProcess) -> None:
    alive = guarded_start.wait_for("/livez", 200)
    assert alive.json()["status"] == "starting"
    assert alive.json()["step"] in ("reading the options", "loading the model")
    ready = get(guarded_start, "/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "starting")
    assert get(guarded_start, "/v1/models").status_code == 401
    loading = get(guarded_start, "/v1/models", KEY)
    assert loading.status_code == 503
    assert "loading" in loading.json()["error"]["message"]
    assert int(loading.headers["retry-after"]) > 0
    assert "API key" in get(guarded_start, "/").text


def test_every_route_of_the_running_server_needs_a_key(guarded: ServerProcess) -> None:
    description = get(guarded, "/openapi.json", KEY).json()
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
        f"{guarded.url}/scale_elastic_ep", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert closed.status_code == 404
    routes += [("get", path) for path in ("/status.json", "/docs", "/openapi.json", "/no/such")]
    for method, path in routes:
        answer = httpx.request(method, f"{guarded.url}{path}", timeout=30)
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["code"] == 401
    assert "vllm:num_requests_running" in get(guarded, "/metrics").text


def test_what_the_router_refuses_is_an_openai_error(guarded: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {FIXED_KEY}", "Content-Type": "application/json"}
    for method, path, body, status in (
        ("GET", "/no/such", b"", 404),
        ("PUT", "/v1/models", b"", 405),
        ("POST", "/tokenize", b"\xff\x00", 400),
    ):
        answer = httpx.request(
            method, f"{guarded.url}{path}", content=body, headers=headers, timeout=60
        )
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status
        assert answer.json()["error"]["message"]
        assert ("GET" in answer.headers.get("allow", "")) == (status == 405)


def test_the_openai_client_is_told_what_is_wrong(guarded: ServerProcess) -> None:
    good = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=FIXED_KEY, max_retries=0)
    assert [model.id for model in good.models.list()] == ["sliced"]
    bad = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="guessed", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        bad.models.list()
    assert "not valid" in str(caught.value)
    assert "guessed" not in str(caught.value)


def test_a_websocket_without_a_key_is_refused(guarded: ServerProcess) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"GET /v1/realtime HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_keys_rotate_without_a_restart(guarded: ServerProcess, guarded_keys: Path) -> None:
    assert get(guarded, "/v1/models", KEY).status_code == 200
    assert get(guarded, "/v1/models", OTHER_KEY).status_code == 401
    replacement = guarded_keys.with_name("new")
    replacement.write_text(f"{OTHER_KEY}\n")
    replacement.rename(guarded_keys)
    assert get(guarded, "/v1/models", KEY).status_code == 401
    assert get(guarded, "/v1/models", OTHER_KEY).status_code == 200


def test_browsers_of_other_origins_get_no_permission(guarded: ServerProcess) -> None:
    headers = {"Origin": "https://a.example", "Authorization": f"Bearer {FIXED_KEY}"}
    answer = httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=60)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
