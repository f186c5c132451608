"""What our layers cost: `sliceserve serve` against vLLM's own server, with the same model.

    python benchmarks/overhead.py DIR --rounds 5

Both servers run on this machine, one at work at a time, in turns; `vllm bench serve` asks them,
one request at a time and many. The smaller the model, the more the layers weigh.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

VLLM = [sys.executable, str(Path(__file__).with_name("vllm_cli.py"))]
SLICESERVE = str(Path(sys.executable).with_name("sliceserve"))
KEY = "overhead"
WAIT_S = 300
# Name of the figure, key in the result of `vllm bench serve`, and requests at a time.
FIGURES = (
    ("latency, ms", "median_e2el_ms", 1),
    ("TTFT, ms", "median_ttft_ms", 1),
    ("requests/s, 64 at a time", "request_throughput", 64),
)


@contextmanager
def served(command: list[str], health: str) -> Iterator[str]:
    """Run a server until the end of the block; gives its URL once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = os.environ | {"SLICESERVE_API_KEY": KEY, "VLLM_API_KEY": KEY}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with subprocess.Popen(
        [*command, "--port", port, "--dtype", "float32", "--enforce-eager"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + WAIT_S
            while not answers(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(command)} did not start")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Whether there is a 200."""
    try:
        return httpx.get(url, timeout=60).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def bench(url: str, directory: Path, at_once: int, requests: int) -> dict[str, Any]:
    """Return what `vllm bench serve` measures."""
    with tempfile.TemporaryDirectory() as work:
        command = [
            *VLLM, "bench", "serve", "--backend", "openai", "--base-url", url,
            "--model", "served", "--tokenizer", directory, "--dataset-name", "random",
            "--random-input-len", "64", "--random-output-len", "32", "--ignore-eos",
            "--num-prompts", str(requests), "--max-concurrency", str(at_once),
            "--percentile-metrics", "ttft,e2el", "--save-result", "--result-dir", work,
            "--result-filename", "result.json", "--disable-tqdm",
        ]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        result: dict[str, Any] = json.loads((Path(work) / "result.json").read_text())
    if result["completed"] != requests:
        sys.exit(f"{requests - result['completed']} of {requests} requests failed")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    name = ["--served-model-name", "served"]
    commands = {
        "vLLM": ([*VLLM, "serve", str(options.directory), *name], "/health"),
        "sliceserve": ([SLICESERVE, "serve", str(options.directory), *name,
                        "--access-log", "/dev/null"], "/readyz"),
    }  # fmt: skip
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as running, tqdm(total=2 * 2 * (options.rounds + 1), unit="run") as bar:
        urls = {name: running.enter_context(served(*command)) for name, command in commands.items()}
        for number in range(options.rounds + 1):
            for server in list(urls)[:: 1 if number % 2 else -1]:
                for at_once in sorted({at_once for *_, at_once in FIGURES}):
                    result = bench(urls[server], options.directory, at_once, options.requests)
                    bar.update()
                    for figure, key, of in FIGURES:
                        if of == at_once and number:  # the first round warms up
                            found.setdefault((figure, server), []).append(result[key])
    print(f"| median of {options.rounds} | vLLM | sliceserve | | spread of vLLM's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for figure, *_ in FIGURES:
        theirs, ours = (found[figure, server] for server in ("vLLM", "sliceserve"))
        middle = statistics.median(theirs)
        ratio = statistics.median(ours) / middle
        spread = (max(theirs) - min(theirs)) / middle
        print(f"| {figure} | {middle:.2f} | {statistics.median(ours):.2f} | × {ratio:.3f} "
              f"| {spread:.1%} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
