"""Signals, with a real process and a stand-in for the engine; at last with vLLM's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import told_engine
from life_process import LARGE
from otlp_collector import collecting, silent_collector
from server_process import (
    STOP_SECONDS,
    post,
    read_stat,
    sample,
    serving,
    stream,
    wait_for_end_of,
    wait_until_gone,
)

KEY = "key"
SCRIPT = Path(__file__).with_name("life_process.py")
# What takes longer hangs.
LIMIT_S = 60
PATIENT_EXPORTER = {"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "600"}  # seconds


@contextmanager
def process(
    drain_timeout: float, *options: str, stderr: int | None = None, **variables: str
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [sys.executable, str(SCRIPT), str(drain_timeout), *options]
    # Where vLLM 0.24 does not log by itself.
    environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"} | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    ) as started:
        try:
            assert started.stdout
            yield started, f"http://127.0.0.1:{int(started.stdout.readline())}"
        finally:
            started.kill()


def end_of(started: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    output, _ = started.communicate(timeout=LIMIT_S)
    return started.returncode, output.splitlines()


def is_closed(url: str) -> bool:
    try:
        httpx.get(url, timeout=LIMIT_S)
    except httpx.TransportError:
        return True
    return False


def test_a_drain_that_takes_too_long_ends_and_the_client_is_cut() -> None:
    with process(0.5) as (started, url), httpx.stream("GET", url, timeout=LIMIT_S) as answer:
        chunks = answer.iter_bytes()
        assert next(chunks) == b"begun"
        started.send_signal(signal.SIGTERM)
        code, output = end_of(started)
        assert code == 0
        assert output[:2] == ["cut", "shutdown 10"]


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


def test_a_second_signal_while_the_engine_stops_ends_its_processes() -> None:
    with process(10_000, "stuck") as (started, url):
        assert started.stdout
        worker = Path(f"/proc/{int(started.stdout.readline())}/stat")
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        assert started.stdout.readline() == "shutdown 10\n"
        assert read_stat(worker)
        started.send_signal(signal.SIGTERM)
        assert end_of(started)[0] == 128 + signal.SIGTERM
    wait_for_end_of(worker)


def test_a_thread_that_stays_does_not_hold_the_end_up() -> None:
    with process(2, "stays", "brief", stderr=subprocess.STDOUT) as (started, url):
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        code, output = end_of(started)
    assert code == 1
    assert told_end(output) == "within 3 s; it is ended although this still runs: plugin."


def test_a_second_signal_shortens_the_bound_of_the_end() -> None:
    with (
        process(10_000, "stays", "brief", stderr=subprocess.STDOUT) as (started, url),
        httpx.stream("GET", url, timeout=LIMIT_S) as answer,
    ):
        assert next(answer.iter_bytes()) == b"begun"
        started.send_signal(signal.SIGTERM)
        assert httpx.get(url, timeout=LIMIT_S).status_code == 503
        started.send_signal(signal.SIGINT)
        code, output = end_of(started)
    assert code == 1
    assert told_end(output) == "within 1 s; it is ended although this still runs: plugin."


def test_an_engine_that_does_not_stop_is_ended_with_the_server() -> None:
    with process(0, "stuck", "brief", stderr=subprocess.STDOUT) as (started, url):
        assert started.stdout
        worker = Path(f"/proc/{int(started.stdout.readline())}/stat")
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        assert read_stat(worker)
        started.send_signal(signal.SIGTERM)
        code, output = end_of(started)
    assert code == 1
    assert "shutdown 10" in output
    assert re.search(r"within 1 s; .* runs: MainThread, .*Process-1 \(\d+\)\.$", told_end(output))
    wait_for_end_of(worker)


def told_end(output: list[str]) -> str:
    """What the log says of an end that took too long."""
    (said,) = (line for line in output if "The server did not end " in line)
    return said.partition("The server did not end ")[2]


def test_a_client_that_reads_slowly_has_the_time_of_the_drain() -> None:
    """An answer that is written whole is over for the server, and not for the client."""
    with process(10_000) as (started, url), httpx.stream("GET", f"{url}/large") as answer:
        chunks = answer.iter_bytes()
        read = len(next(chunks))
        started.send_signal(signal.SIGTERM)
        while not is_closed(url):
            time.sleep(0.05)
        time.sleep(2)  # longer than connections have in this process without a drain
        assert read + sum(map(len, chunks)) == LARGE
        assert end_of(started)[0] == 0


def test_an_idle_server_leaves_without_waiting() -> None:
    with process(10_000) as (started, url):
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        assert end_of(started)[0] == 0


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_never_answers_does_not_hold_the_end_up(protocol: str) -> None:
    """The exporter waits for it longer than the server's end may take, which would end with 1."""
    environment = PATIENT_EXPORTER | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol}
    with silent_collector() as url, process(0, url, **environment) as (started, ours):
        assert httpx.get(f"{ours}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        assert end_of(started)[0] == 0


def test_the_last_spans_are_sent() -> None:
    environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with collecting() as collector, process(0, collector.url, **environment) as (started, url):
        assert httpx.get(f"{url}/metrics", timeout=LIMIT_S).text == "begun"
        started.send_signal(signal.SIGTERM)
        assert end_of(started)[0] == 0
        assert [span.name for span in collector.spans] == ["last"]


@pytest.mark.parametrize(("fault", "before"), [("die", []), ("hang", ["cut"])])
def test_an_engine_that_dies_or_hangs_ends_the_server(fault: str, before: list[str]) -> None:
    with process(10_000) as (started, url):
        with httpx.stream("GET", f"{url}/{fault}", timeout=LIMIT_S) as answer:
            assert next(answer.iter_bytes()) == b"begun"
            code, output = end_of(started)
        assert code == 1
        assert output[: len(before) + 1] == [*before, "shutdown 10"]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_fault_while_it_drains_is_no_orderly_end(fault: str) -> None:
    with process(3) as (started, url), httpx.stream("GET", url, timeout=LIMIT_S) as answer:
        chunks = answer.iter_bytes()
        assert next(chunks) == b"begun"
        with httpx.stream("GET", f"{url}/{fault}", timeout=LIMIT_S) as other:
            assert next(other.iter_bytes()) == b"begun"
            started.send_signal(signal.SIGTERM)
            assert end_of(started)[0] == 1


def test_what_outlives_the_drain_ends_with_an_error(tiny_sliced: Path, tmp_path: Path) -> None:
    """And not as an answer that looks complete, which vLLM makes of what it aborts.

    Its traces go where nobody answers.
    """
    engine = tmp_path / "engine"
    engine.mkdir()
    told_engine.installed(engine)
    (engine / "slow").touch()
    environment = PATIENT_EXPORTER | {"PYTHONPATH": str(engine), "SLICESERVE_API_KEY": KEY}
    options = ("--drain-timeout", "1", "--metrics-public", "--otlp-traces-endpoint")
    with (
        silent_collector() as url,
        serving(tiny_sliced, tmp_path / "log", *options, url, **environment) as server,
    ):
        server.wait_for("/readyz", 200)
        with stream(server, KEY, tokens=500) as answer, ThreadPoolExecutor(1) as pool:
            assert answer.status_code == 200
            whole = pool.submit(post, server, KEY, max_tokens=500)
            while sample(server, "sliceserve_running_requests") < 2:
                assert not whole.done(), whole.result().text
                time.sleep(0.05)
            server.process.terminate()
            events = [line for line in answer.iter_lines() if line]
            cut = whole.result()
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
        assert cut.status_code == 503
        assert cut.json()["error"] == error
        assert server.process.wait(STOP_SECONDS) == 0, server.log.read_text()
        wait_until_gone(server.process.pid)
