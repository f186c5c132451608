"""A restart under load, over TLS: what one server has begun to answer it answers to its end."""

import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import told_engine
import trustme
from server_process import (
    START_SECONDS,
    STOP_SECONDS,
    ServerProcess,
    reserved_port,
    sample,
    started,
)

KEY = "key"
TOKENS = 20
CLIENTS = 6


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, str]:
    """The files of a server's certificate and key, and of whom to trust."""
    authority, names = trustme.CA(), {}
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("cert", "key", "ca"):
        names[name] = str(tmp_path / f"{name}.pem")
    return names


@contextmanager
def secured(
    command: list[str], port: int, log: Path, environment: dict[str, str]
) -> Iterator[ServerProcess]:
    with started(command, port, log, environment) as server:
        yield replace(server, url=server.url.replace("http:", "https:"))


def ask_on(url: str, trust: ssl.SSLContext, over: threading.Event, *, streamed: bool) -> int:
    """Ask again and again; return how many answers came whole. One that breaks off is raised."""
    whole = 0
    with httpx.Client(verify=trust, timeout=120) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http)
        while not over.is_set():
            try:
                answer = client.completions.create(
                    model="sliced", prompt="hi", max_tokens=TOKENS, stream=streamed,
                    stream_options={"include_usage": True} if streamed else None,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
            except openai.APIConnectionError:
                time.sleep(0.05)
                continue
            except openai.APIStatusError as refused:
                if refused.status_code != 503:
                    raise
                time.sleep(0.05)
                continue
            usage = list(answer)[-1].usage if isinstance(answer, openai.Stream) else answer.usage
            assert usage is not None
            assert usage.completion_tokens == TOKENS
            whole += 1
    return whole


def asked(server: ServerProcess) -> list[dict[str, object]]:
    """The completions that a server logged."""
    whole, _, _ = server.log.read_text().rpartition("\n")  # of the last line a part may be there
    lines = whole.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"time"')]
    return [line for line in found if line["route"] == "/v1/completions"]


def logged(server: ServerProcess) -> list[dict[str, object]]:
    """Those with 200."""
    return [line for line in asked(server) if line["status"] == 200]


def wait_until(condition: Callable[[], bool], server: ServerProcess) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_a_restart_under_load_loses_no_answer(
    tiny_sliced: Path,
    certificates: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificates["ca"])  # for all that httpx asks here
    trust = ssl.create_default_context(cafile=certificates["ca"])
    (tmp_path / "engine").mkdir()
    engine = told_engine.installed(tmp_path / "engine")
    environment = {"PYTHONPATH": str(engine), "SLICESERVE_API_KEY": KEY}
    over = threading.Event()
    with reserved_port() as port, ThreadPoolExecutor(CLIENTS) as pool:
        command = [
            str(Path(sys.executable).with_name("sliceserve")), "serve", str(tiny_sliced),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
            "--served-model-name", "sliced", "--metrics-public",
            "--ssl-certfile", certificates["cert"], "--ssl-keyfile", certificates["key"],
        ]  # fmt: skip
        try:
            with secured(command, port, tmp_path / "first", environment) as first:
                first.wait_for("/readyz", 200)
                with pytest.raises(httpx.RemoteProtocolError):
                    httpx.get(f"http://127.0.0.1:{port}/livez")
                asking = [
                    pool.submit(ask_on, first.url, trust, over, streamed=number % 2 == 0)
                    for number in range(CLIENTS)
                ]
                wait_until(lambda: len(logged(first)) > CLIENTS, first)
                # From here on what has begun takes seconds, so that the drain has to wait.
                (engine / "slow").touch()
                before = len(logged(first))
                wait_until(lambda: sample(first, "sliceserve_running_requests") == CLIENTS, first)
                first.process.terminate()
                assert first.process.wait(STOP_SECONDS) == 0, first.log.read_text()
                (engine / "slow").unlink()
            with secured(command, port, tmp_path / "second", environment) as second:
                second.wait_for("/readyz", 200)
                wait_until(lambda: len(logged(second)) > CLIENTS, second)
                over.set()
                whole = sum(client.result() for client in asking)
                second.process.terminate()
                assert second.process.wait(STOP_SECONDS) == 0, second.log.read_text()
        finally:
            over.set()
    (draining,) = (line for line in first.log.read_text().splitlines() if "Draining:" in line)
    assert "running=0" not in draining
    assert len(logged(first)) >= before + CLIENTS
    told = {(line["status"], line["refused"], line["disconnected"]) for line in asked(first)}
    assert told <= {(200, None, False), (503, "draining", False)}
    answered = logged(first) + logged(second)
    assert len(answered) == whole
    assert not any(line["failed"] or line["disconnected"] for line in answered)
