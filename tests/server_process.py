"""A real server process for tests, and what is looked up about it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 300
STOP_SECONDS = 60
# The second has the engine work as with one GPU, without another process for the worker.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@dataclass(frozen=True)
class ServerProcess:
    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def wait_for(self, path: str, *statuses: int) -> httpx.Response:
        """The first answer with one of these statuses."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {statuses} yet:\n{self.log.read_text()}"
            try:
                answer = httpx.get(f"{self.url}{path}", timeout=30)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code in statuses:
                    return answer
            time.sleep(0.2)

    def engine(self) -> int:
        """The process id of the engine."""
        (found,) = (
            int(stat.parent.name)
            for stat in Path("/proc").glob("[0-9]*/stat")
            if (fields := read_stat(stat))
            and fields[0] == "VLLM::EngineCor"  # the kernel cuts names
            and int(fields[2]) == self.process.pid
        )
        return found


def read_stat(stat: Path) -> list[str]:
    """The name, the state, the parent, the group, the session and more of a process."""
    try:
        name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
    except OSError:  # it ended meanwhile
        return []
    return [name, *rest.split()]


def running_in_session(session: int) -> list[str]:
    """The processes of a session that are not zombies."""
    everything = map(read_stat, Path("/proc").glob("[0-9]*/stat"))
    return [
        fields[0] for fields in everything if fields and int(fields[4]) == session
        and fields[1] != "Z"
    ]  # fmt: skip


def wait_until_gone(session: int) -> None:
    """Wait for the helpers and workers that end by themselves once their parent has."""
    deadline = time.monotonic() + STOP_SECONDS
    while left := running_in_session(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_for_end_of(stat: Path) -> None:
    """Wait until a process, of which this is the file in /proc, has ended."""
    deadline = time.monotonic() + STOP_SECONDS
    while (fields := read_stat(stat)) and fields[1] != "Z":
        assert time.monotonic() < deadline, fields
        time.sleep(0.05)


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """A process that stands still for the time of the block, so that no answer can end in it."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def stream(server: ServerProcess, key: str, tokens: int, prompt: str = "hi") -> Any:
    """A streamed completion, to be read within a block; its last event tells its tokens."""
    body = {"model": "sliced", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json=body | {"stream": True, "stream_options": {"include_usage": True}},
        headers=headers,
        timeout=120,
    )


def post(server: ServerProcess, key: str, **asked: Any) -> httpx.Response:
    """A completion of five tokens, or what is asked."""
    body = {"model": "sliced", "prompt": "hi", "max_tokens": 5, "ignore_eos": True} | asked
    return httpx.post(
        f"{server.url}/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
    )


def sample(server: ServerProcess, name: str, key: str = "none") -> float:
    """The value of a series of one sample; no key is needed where the metrics are public."""
    headers = {"Authorization": f"Bearer {key}"}
    (value,) = (
        found.value
        for family in text_string_to_metric_families(
            httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text
        )
        for found in family.samples
        if found.name == name
    )
    return float(value)


def ends_with_its_engine(server: ServerProcess, key: str, fail: Callable[[int], None]) -> None:
    """Let the engine, which stands still, fail: clients are told, and the server ends with 1."""
    os.kill(engine := server.engine(), signal.SIGSTOP)
    with stream(server, key, tokens=500) as answer, ThreadPoolExecutor(1) as pool:
        assert answer.status_code == 200
        whole = pool.submit(post, server, key, max_tokens=500)
        while sample(server, "sliceserve_running_requests", key) < 2:
            assert not whole.done(), whole.result().text
            time.sleep(0.05)
        fail(engine)
        rest = "".join(answer.iter_lines())
        assert '"error"' in rest
        assert whole.result().status_code == 500
        error = whole.result().json()["error"]
        assert (error["code"], error["type"]) == (500, "InternalServerError")
        assert "Traceback" not in rest + whole.result().text
    assert scraped_to_its_end(server, key) == 1, server.log.read_text()


def scraped_to_its_end(server: ServerProcess, key: str) -> int:
    """The exit code of a server that ends and is asked for metrics meanwhile."""
    deadline = time.monotonic() + STOP_SECONDS
    while (code := server.process.poll()) is None:
        assert time.monotonic() < deadline, server.log.read_text()
        with suppress(httpx.TransportError):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30)
            assert answer.status_code == 200
            assert "sliceserve_running_requests" in answer.text
    wait_until_gone(server.process.pid)
    return code


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given within the block, for one who binds it as servers do."""
    with socket.socket() as held:
        # Two sockets may have a port with this, of which one listens.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def serving(
    directory: Path, log: Path, *options: str, **environment: str
) -> Iterator[ServerProcess]:
    """A server that may still be starting; nothing of it is left after the block."""
    command = [str(Path(sys.executable).with_name("sliceserve")), "serve", str(directory)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", *options]
    with (
        reserved_port() as port,
        started([*command, "--port", str(port)], port, log, environment) as server,
    ):
        yield server


@contextmanager
def started(
    command: list[str], port: int, log: Path, environment: dict[str, str]
) -> Iterator[ServerProcess]:
    """A command that serves on a port; nothing of it is left after the block."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | environment,
            start_new_session=True,
        )
    try:
        yield ServerProcess(process, f"http://127.0.0.1:{port}", log)
    finally:
        if running_in_session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
