"""Many connections at once, a third of them left early: does anything leak, do counters add up?

    pip install '.[load]'   # Locust
    python benchmarks/load.py DIR --users 200 --seconds 60

Serves DIR on the CPU, lets Locust load it twice for so long, and prints a table: memory and open
files of the server before, between and after. The exit code is 1 if a counter does not add up, the
KV cache is not empty or a request failed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

USERS = Path(__file__).with_name("load_users.py")
ROUTE = "/v1/completions"
WAIT_S = 300


def samples(url: str, name: str) -> dict[tuple[str, ...], float]:
    """Return a series' samples by the values of their labels."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return {
        tuple(found.labels.values()): found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name == name
    }


def responses(url: str) -> Counter[str]:
    """Return how many completions ended with which status."""
    found = samples(url, "sliceserve_http_responses_total")
    return Counter(
        {labels[-1]: int(n) for labels, n in found.items() if "completions" in labels[1]}
    )


def usage(server: psutil.Process) -> tuple[float, int]:
    """Return megabytes of memory and open files of the API process and all it has started."""
    processes = [server, *server.children(recursive=True)]
    return (
        sum(process.memory_info().rss for process in processes) / 1e6,
        sum(process.num_fds() for process in processes),
    )


def load(url: str, users: int, seconds: int) -> Counter[str]:
    """Let Locust load the server; return how many requests of which kind, and failures."""
    command = [
        sys.executable, "-m", "locust", "-f", str(USERS), "--headless", "--json", "--host", url,
        "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s",
        "--stop-timeout", "120", "--exit-code-on-error", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    found = Counter({row["name"]: row["num_requests"] for row in rows})
    found["failures"] = sum(row["num_failures"] for row in rows)
    return found


def wait_until_idle(url: str) -> None:
    """Wait until the engine runs nothing and its cache is empty.

    Its gauges are those of its last step, so there must be one.
    """
    body = {"model": "load", "prompt": "hi", "max_tokens": 1}
    headers = {"Authorization": "Bearer load"}
    end = time.monotonic() + WAIT_S
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while True:
        httpx.post(f"{url}{ROUTE}", json=body, headers=headers, timeout=60)
        if not any(sum(samples(url, name).values()) for name in names):
            return
        if time.monotonic() > end:
            sys.exit("the engine is not idle: requests or blocks of the KV cache are left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        Path(sys.executable).with_name("sliceserve"), "serve", options.directory, "--port",
        str(port), "--dtype", "float32", "--enforce-eager", "--served-model-name", "load",
        "--metrics-public", "--access-log", "off",
    ]  # fmt: skip
    environment = os.environ | {"SLICESERVE_API_KEY": "load"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            return watch(url, psutil.Process(process.pid), options.users, options.seconds)
        finally:
            process.terminate()


def watch(url: str, server: psutil.Process, users: int, seconds: int) -> int:
    """Load the server twice and print what it took."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=60).status_code == httpx.codes.OK:
                break
        except httpx.TransportError:
            pass
        if time.monotonic() > end or not server.is_running():
            sys.exit("the server did not start")
        time.sleep(0.5)
    wait_until_idle(url)
    rows = [("before", *usage(server))]
    wrong = []
    for name in ("after once", "after twice"):
        before = responses(url)
        sent = load(url, users, seconds)
        counted = responses(url) - before
        print(f"{name}: sent {dict(sent)}, counted {dict(counted)}", flush=True)
        # An answer may have ended at the server before its client left.
        late = sent["left"] - counted["disconnected"]
        finished = {"200": sent["whole"] + sent["stream"] + late}
        if late < 0 or counted != Counter(finished | {"disconnected": sent["left"] - late}):
            wrong.append(f"{name}: the counters do not add up")
        if sent["failures"]:
            wrong.append(f"{name}: {sent['failures']} requests failed")
        wait_until_idle(url)
        rows.append((name, *usage(server)))
    print(f"\n{'':12} {'memory, MB':>10} {'open files':>10}")
    for name, memory, files in rows:
        print(f"{name:12} {memory:10,.0f} {files:10}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
