"""A port's servers one after the other, with vLLM's engine, each ended by a fault or in a hurry."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import pytest
import told_engine
from server_process import (
    START_SECONDS,
    STOP_SECONDS,
    ServerProcess,
    post,
    reserved_port,
    sample,
    scraped_to_its_end,
    started,
    stream,
    wait_until_gone,
)

KEY = "key"
Start = Callable[..., AbstractContextManager[ServerProcess]]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Where files tell the engine what to do."""
    directory = tmp_path / "engine"
    directory.mkdir()
    return told_engine.installed(directory)


@pytest.fixture
def start(tiny_sliced: Path, tmp_path: Path, engine: Path, port: int) -> Start:
    """Starts a server on the port with these options."""
    environment = {"PYTHONPATH": str(engine), "SLICESERVE_API_KEY": KEY}
    command = [
        str(Path(sys.executable).with_name("sliceserve")), "serve", str(tiny_sliced),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--metrics-public",
    ]  # fmt: skip
    return lambda *options: started([*command, *options], port, tmp_path / "log", environment)


def wait_for_weights(server: ServerProcess) -> None:
    """Wait until the engine has loaded the model."""
    deadline = time.monotonic() + START_SECONDS
    while server.wait_for("/livez", 200).json().get("weights_loaded") != 1:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_a_start_that_hangs_ends_with_1(start: Start, engine: Path) -> None:
    (engine / "hold").touch()
    with start("--start-timeout", "3") as server:
        assert server.process.wait(START_SECONDS) == 1
        wait_until_gone(server.process.pid)
    assert "did not start within 3 s (--start-timeout): it was loading" in server.log.read_text()


def test_a_signal_while_the_model_loads_ends_all(start: Start, engine: Path) -> None:
    (engine / "hold").touch()
    with start() as server:
        wait_for_weights(server)
        server.process.terminate()
        assert server.process.wait(STOP_SECONDS) == 128 + signal.SIGTERM
        wait_until_gone(server.process.pid)


def test_an_engine_that_hangs_ends_the_server(start: Start) -> None:
    with start("--probe-timeout", "1", "--hang-timeout", "10") as server:
        server.wait_for("/readyz", 200)
        os.kill(server.engine(), signal.SIGSTOP)
        with stream(server, KEY, tokens=500) as answer, ThreadPoolExecutor(1) as pool:
            assert answer.status_code == 200
            whole = pool.submit(post, server, KEY, max_tokens=500)
            while sample(server, "sliceserve_running_requests") < 2:
                assert not whole.done(), whole.result().text
                time.sleep(0.05)
            assert "has not answered" in server.wait_for("/livez", 503).json()["step"]
            assert sample(server, "sliceserve_ready") == 0
            events = [line for line in answer.iter_lines() if line]
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
        assert whole.result().status_code == 503
        assert whole.result().json()["error"] == error
        assert scraped_to_its_end(server, KEY) == 1, server.log.read_text()
    assert "The engine hangs." in server.log.read_text()


def test_the_next_server_on_its_port_serves_and_a_second_signal_ends_its_drain(
    start: Start, engine: Path
) -> None:
    with start("--drain-timeout", "1000") as server:
        server.wait_for("/readyz", 200)
        assert post(server, KEY).json()["usage"]["completion_tokens"] == 5
        (engine / "slow").touch()
        with stream(server, KEY, tokens=500) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for("/readyz", 503).json()["status"] == "draining"
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(STOP_SECONDS) == 128 + signal.SIGINT
            wait_until_gone(server.process.pid)
            rest: list[str] = []
            with suppress(httpx.TransportError):  # it may be told of the end, or not
                rest.extend(lines)
    assert not any('"finish_reason":"length"' in line for line in rest)
