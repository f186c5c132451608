"""Signals, with a real process and a stand-in for the engine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

SCRIPT = Path(__file__).with_name("life_process.py")
# What takes longer hangs.
LIMIT_S = 60


@contextmanager
def process(drain_timeout: float) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [sys.executable, str(SCRIPT), str(drain_timeout)]
    # Where vLLM 0.24 does not log by itself.
    environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as started:
        try:
            assert started.stdout
            yield started, f"http://127.0.0.1:{int(started.stdout.readline())}"
        finally:
            started.kill()


def end_of(started: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    output, _ = started.communicate(timeout=LIMIT_S)
    return started.returncode, output.splitlines()


def test_a_drain_that_takes_too_long_ends_and_the_client_is_cut() -> None:
    with process(0.5) as (started, url), httpx.stream("GET", url, timeout=LIMIT_S) as answer:
        chunks = answer.iter_bytes()
        assert next(chunks) == b"begun"
        started.send_signal(signal.SIGTERM)
        code, output = end_of(started)
        assert code == 0
        assert output[0] == "shutdown 10"


def test_a_second_signal_ends_at_once() -> None:
    with process(10_000) as (started, url), httpx.stream("GET", url, timeout=LIMIT_S) as answer:
        chunks = answer.iter_bytes()
        assert next(chunks) == b"begun"
        started.send_signal(signal.SIGTERM)
        assert httpx.get(url, timeout=LIMIT_S).status_code == 503
        started.send_signal(signal.SIGINT)
        code, output = end_of(started)
        assert code == 128 + signal.SIGINT
        assert output[0] == "shutdown 0"


def test_an_idle_server_leaves_without_waiting() -> None:
    with process(10_000) as (started, url):
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        assert end_of(started)[0] == 0


def test_a_dead_engine_ends_the_server_and_what_still_runs() -> None:
    with process(10_000) as (started, url):
        with httpx.stream("GET", f"{url}/die", timeout=LIMIT_S) as answer:
            assert next(answer.iter_bytes()) == b"begun"
            code, output = end_of(started)
        assert code == 1
        assert output[0] == "shutdown 10"
