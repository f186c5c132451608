"""Many connections at once, some left early, some refused: does anything leak, does all add up?

    pip install '.[load]'   # Locust
    python benchmarks/load.py DIR --users 200 --seconds 90 --passes 5

Serves DIR on the CPU, lets Locust load it so many times for so long, and after each pass compares
what the users sent and got with the server's counters, and prints memory and open files. The exit
code is 1 if

- a response, a refusal, a client that left, or a token of a prompt or an answer is counted wrongly
  (of an answer that was left, the tokens are between those that were read and those asked for),
- a gauge does not go back to 0, or the KV cache is not empty,
- a request failed, or
- memory or open files grow without levelling: in the last pass more than half as much as in the
  second, the first after that in which all is touched for the first time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from serving import KEY, NAME, SLICESERVE, Server, served

USERS = Path(__file__).with_name("load_users.py")
ROUTE = "/v1/completions"
WAIT_S = 300
GAUGES = (
    "sliceserve_running_requests",
    "sliceserve_queued_prompt_tokens",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
COLUMNS = (
    "pass", "requests", "left early", "refused", "counted with 200", "as disconnected",
    "tokens in", "tokens out", "most at once", "API, MB after", "engine, MB after",
    "open files after",
)  # fmt: skip
# What a pass may take more than the one before without a leak.
NOISE = {"memory of the API": 4.0, "memory of the engine": 4.0, "open files": 0.0}


def scrape(url: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Return all samples, by name and the values of their labels."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def samples(url: str, name: str) -> dict[tuple[str, ...], float]:
    """Return a series' samples by the values of their labels."""
    return scrape(url).get(name, {})


def counters(url: str) -> Counter[str]:
    """Return what the server has counted: completions by status, refusals by reason, tokens."""
    found, counted = scrape(url), Counter[str]()
    for (_, route, status), value in found.get("sliceserve_http_responses_total", {}).items():
        if route == ROUTE:
            counted[f"status {status}"] += int(value)
    for (_, reason), value in found["sliceserve_rejected_total"].items():
        counted[f"refused: {reason}"] += int(value)
    for name in ("prompt_tokens", "generation_tokens"):
        counted[name] = int(sum(found[f"sliceserve_{name}_total"].values()))
    return counted


def usage(server: psutil.Process) -> tuple[float, float, int]:
    """Return megabytes of memory of the API process and of all it has started, and open files."""
    started = server.children(recursive=True)
    return (
        server.memory_info().rss / 1e6,
        sum(process.memory_info().rss for process in started) / 1e6,
        sum(process.num_fds() for process in [server, *started]),
    )


def load(url: str, users: int, seconds: int) -> tuple[Counter[str], int]:
    """Let Locust load the server; return what its users sent and got, and the most at once."""
    most = 0
    with tempfile.TemporaryDirectory() as work:
        totals = Path(work) / "totals.json"
        command = [
            sys.executable, "-m", "locust", "-f", str(USERS), "--headless", "--host", url,
            "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s",
            "--stop-timeout", "120", "--exit-code-on-error", "0", "--totals", str(totals),
        ]  # fmt: skip
        with (Path(work) / "log").open("w+") as log:
            locust = subprocess.Popen(command, stdout=log, stderr=log)
            while locust.poll() is None:
                most = max(most, int(sum(samples(url, GAUGES[0]).values())))
                time.sleep(1)
            if locust.returncode:
                log.seek(0)
                sys.exit(f"{log.read()[-3000:]}\nLocust failed")
        return Counter(json.loads(totals.read_text())), most


def wait_until_idle(url: str) -> Counter[str]:
    """Wait until all gauges are 0; return what that has cost, as `load` does.

    The engine's gauges are those of its last step, so there must be one.
    """
    body = {"model": NAME, "prompt": [1, 2], "max_tokens": 1, "ignore_eos": True}
    end = time.monotonic() + WAIT_S
    sent = Counter[str]()
    while True:
        answer = httpx.post(
            f"{url}{ROUTE}", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        answer.raise_for_status()
        sent.update(whole=1, prompt_tokens=2, tokens=1)
        time.sleep(0.2)
        found = scrape(url)
        left = {name: value for name in GAUGES if (value := sum(found.get(name, {}).values()))}
        if not left:
            return sent
        if time.monotonic() > end:
            sys.exit(f"the server is not idle after {WAIT_S} s: {left}")


def differences(sent: Counter[str], counted: Counter[str]) -> list[str]:
    """Return a sentence for each thing that users and server count differently."""
    # An answer may have ended at the server before its client left.
    late = max(0, sent["left"] - counted["status disconnected"])
    expected = {
        "status 200": sent["whole"] + sent["stream"] + late,
        "status 400": sent["refused"],
        "status disconnected": sent["left"] - late,
        "refused: asks_too_much": sent["refused"],
        "prompt_tokens": sent["prompt_tokens"],
    }
    least, most = (sent["tokens"] + sent[name] for name in ("left_at_least", "left_at_most"))
    wrong = [
        f"{name}: {counted[name]} counted, {expected.get(name, 0)} expected"
        for name in sorted({*counted, *expected} - {"generation_tokens"})
        if counted[name] != expected.get(name, 0)
    ]
    if not least <= counted["generation_tokens"] <= most:
        wrong.append(
            f"generation_tokens: {counted['generation_tokens']} counted, {least} to {most} expected"
        )
    return wrong + [f"{sent[name]} × {name}" for name in sent if name.startswith("failed: ")]


def grows(values: list[float], noise: float) -> bool:
    """Whether the last pass took more, and not much less more than the second one."""
    _, second, *_, last = (after - before for before, after in pairwise(values))
    return last > max(noise, second / 2)


def watch(server: Server, users: int, seconds: int, passes: int) -> int:
    """Load the server and print what it took."""
    process = psutil.Process(server.pid)
    wait_until_idle(server.url)
    took, wrong = [usage(process)], []
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    print(
        f"| before |{' |' * (len(COLUMNS) - 4)} {' | '.join(f'{x:,.0f}' for x in took[0])} |",
        flush=True,
    )
    for number in range(1, passes + 1):
        before = counters(server.url)
        sent, most = load(server.url, users, seconds)
        sent += wait_until_idle(server.url)
        after = counters(server.url)
        counted = Counter({name: after[name] - before[name] for name in after})
        wrong += [f"pass {number}: {difference}" for difference in differences(sent, counted)]
        if not most:
            wrong.append(f"pass {number}: {GAUGES[0]} was never above 0")
        took.append(usage(process))
        cells = [
            sum(sent[kind] for kind in ("whole", "stream", "left", "refused")),
            sent["left"], sent["refused"], counted["status 200"], counted["status disconnected"],
            counted["prompt_tokens"], counted["generation_tokens"], most,
        ]  # fmt: skip
        row = " | ".join(f"{cell:,.0f}" for cell in [number, *cells, *took[-1]])
        print(f"| {row} |", flush=True)
    for values, (name, noise) in zip(zip(*took, strict=True), NOISE.items(), strict=True):
        if grows(list(values), noise):
            wrong.append(f"{name} grows without levelling: {values}")
    print("\n".join(wrong))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=90, help="of a pass")
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    if options.passes < 3:
        parser.error(f"--passes {options.passes}: whether anything grows shows after three")
    command = [
        *SLICESERVE, "serve", str(options.directory), "--dtype", "float32", "--enforce-eager",
        "--metrics-public", "--access-log", "off",
    ]  # fmt: skip
    # A machine this full lets Locust stand still for longer than the 5 s that a connection is kept
    # by default, and then send on one that has just been closed.
    os.environ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"
    with served(command, "/readyz") as server:
        return watch(server, options.users, options.seconds, options.passes)


if __name__ == "__main__":
    sys.exit(main())
