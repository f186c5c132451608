"""Servers that run while they are measured, and what `vllm bench serve` says of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

VLLM = [sys.executable, str(Path(__file__).with_name("vllm_cli.py"))]
SLICESERVE = [sys.executable, "-m", "sliceserve.slicing.cli"]
NAME, KEY = "served", "measured"
WAIT_S = 300


@dataclass(frozen=True)
class Server:
    """One that runs: where it answers, and the process of its API."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time of the API's process so far; engines are processes of their own."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def served(command: list[str], health: str) -> Iterator[Server]:
    """Run a server until the end of the block; gives it once it answers."""
    # Else the server, in a session of its own, would outlive a benchmark that is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = os.environ | {"SLICESERVE_API_KEY": KEY, "VLLM_API_KEY": KEY}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, "--port", port, "--served-model-name", NAME],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
            # An interrupt is for whoever measures, which then ends this.
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            end = time.monotonic() + WAIT_S
            while not answers(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{log.read()[-3000:]}\n{' '.join(command)} did not start")
                time.sleep(0.5)
            yield Server(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Whether there is a 200."""
    try:
        return httpx.get(url, timeout=60).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def bench(
    server: Server, directory: Path, at_once: int, requests: int, lengths: tuple[int, int]
) -> dict[str, Any]:
    """Return what `vllm bench serve` measures, and `cpu_ms` of the API's process for a request.

    Args:
        server: to ask.
        directory: of the tokenizer.
        at_once: requests at a time.
        requests: in all, after as many as `at_once` that are not measured.
        lengths: tokens in and out.

    """
    before = server.cpu_seconds()
    with tempfile.TemporaryDirectory() as work:
        command = [
            *VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url,
            "--model", NAME, "--tokenizer", str(directory), "--dataset-name", "random",
            "--random-input-len", str(lengths[0]), "--random-output-len", str(lengths[1]),
            "--ignore-eos", "--num-prompts", str(requests), "--max-concurrency", str(at_once),
            "--num-warmups", str(at_once),
            "--percentile-metrics", "ttft,itl,e2el", "--save-result", "--result-dir", work,
            "--result-filename", "result.json", "--disable-tqdm",
        ]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{run.stderr[-3000:]}\nvllm bench serve failed")
        result: dict[str, Any] = json.loads((Path(work) / "result.json").read_text())
    if result["completed"] != requests:
        sys.exit(f"{requests - result['completed']} of {requests} requests failed")
    return result | {"cpu_ms": (server.cpu_seconds() - before) / (requests + at_once) * 1e3}
