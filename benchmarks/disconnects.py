"""How soon a client that leaves frees its place in the server and its part of the KV cache.

    python benchmarks/disconnects.py DIR --clients 32 --rounds 20

Every round, so many clients begin a long stream and leave at once, at a random moment after its
first token; then `/metrics` is read until nothing runs and the cache is empty.
"""

import argparse
import random
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
from load import samples
from serving import KEY, NAME, SLICESERVE, Server, served
from tqdm import tqdm

FREED = {
    "place in the server": ("sliceserve_running_requests",),
    "KV cache": ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
}
LONG, LATEST_S = 4000, 1.0
WAIT_S = 60


def total(server: Server, name: str) -> float:
    """Return the value of a series, summed over its labels."""
    return sum(samples(server.url, name).values())


def leave(server: Server, clients: int) -> list[float]:
    """Return the seconds from the leaving of all clients until each is free."""
    body = {"model": NAME, "prompt": "Once", "max_tokens": LONG, "stream": True, "ignore_eos": True}
    streams = []  # one that is forgotten closes its connection
    with ExitStack() as leaving:
        for _ in range(clients):
            http = leaving.enter_context(httpx.Client(base_url=server.url, timeout=WAIT_S))
            headers = {"Authorization": f"Bearer {KEY}"}
            request = http.build_request("POST", "/v1/completions", json=body, headers=headers)
            answer = http.send(request, stream=True)
            leaving.callback(answer.close)
            if answer.status_code != httpx.codes.OK:
                sys.exit(f"a stream was answered with {answer.status_code}: {answer.read()!r}")
            streams.append(answer.iter_raw())
            next(streams[-1])
        end = time.monotonic() + WAIT_S
        while (running := total(server, "vllm:num_requests_running")) < clients:
            if time.monotonic() > end:
                sys.exit(f"only {running:.0f} of {clients} streams run")
        time.sleep(random.uniform(0, LATEST_S))  # noqa: S311 - no secret
    left = time.perf_counter()
    freed: dict[str, float] = {}
    while len(freed) < len(FREED):
        for name, series in FREED.items():
            if name not in freed and not any(total(server, one) for one in series):
                freed[name] = time.perf_counter() - left
        if time.perf_counter() - left > WAIT_S:
            sys.exit(f"{WAIT_S} s after the clients left not all is free: {freed}")
    return [freed[name] for name in FREED]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--options", type=shlex.split, default=[], help="of the server, in one")
    options = parser.parse_args()
    command = [*SLICESERVE, "serve", str(options.directory), "--access-log", "/dev/null"]
    with served([*command, "--metrics-public", *options.options], "/readyz") as server:
        found = np.array([leave(server, options.clients) for _ in tqdm(range(options.rounds))])
    print(f"| {options.clients} clients leave, {options.rounds} times | median, s | latest, s |")
    print("| --- | ---: | ---: |")
    for name, seconds in zip(FREED, found.T, strict=True):
        print(f"| {name} | {np.median(seconds):.3f} | {seconds.max():.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
