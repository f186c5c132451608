"""How soon a client that leaves frees its place in the server and its part of the KV cache.

    python benchmarks/disconnects.py DIR --clients 32 --rounds 20

Every round, so many clients ask for a long answer, streamed and then in one piece, and leave at
once, at a random moment after all of them run; then `/metrics` is read until nothing runs and the
cache is empty. The exit code is 1 if anything was free later than after a second.
"""

import argparse
import random
import shlex
import sys
import time
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from json import dumps
from pathlib import Path

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
ALLOWED_S = 1.0


def total(server: Server, name: str) -> float:
    """Return the value of a series, summed over its labels."""
    return sum(samples(server.url, name).values())


def asked(server: Server, *, stream: bool) -> HTTPConnection:
    """Return a connection on which an answer is under way, or the first part of a stream read."""
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT_S)
    body = {"model": NAME, "prompt": "Once", "max_tokens": LONG, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", dumps(body | {"stream": stream}), headers)
    if stream:
        answer = connection.getresponse()
        if answer.status != 200:
            sys.exit(f"a stream was answered with {answer.status}: {answer.read()!r}")
        answer.read1()
    return connection


def leave(server: Server, clients: int, *, stream: bool) -> list[float]:
    """Return the seconds from the leaving of all clients until each is free."""
    with ExitStack() as leaving:
        for _ in range(clients):
            leaving.enter_context(closing(asked(server, stream=stream)))
        end = time.monotonic() + WAIT_S
        while (running := total(server, "vllm:num_requests_running")) < clients:
            if time.monotonic() > end:
                sys.exit(f"only {running:.0f} of {clients} requests run")
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
    kinds = {"stream": True, "in one piece": False}
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    with served([*command, "--metrics-public", *options.options], "/readyz") as server:
        for _ in tqdm(range(options.rounds)):
            for kind, stream in kinds.items():
                found[kind].append(leave(server, options.clients, stream=stream))
    print(f"| {options.clients} clients leave, {options.rounds} times | median, s | latest, s |")
    print("| --- | ---: | ---: |")
    latest = 0.0
    for kind, rounds in found.items():
        for name, seconds in zip(FREED, np.array(rounds).T, strict=True):
            print(f"| {kind}: {name} | {np.median(seconds):.3f} | {seconds.max():.3f} |")
            latest = max(latest, float(seconds.max()))
    if latest > ALLOWED_S:
        print(f"free after {latest:.3f} s, which is later than {ALLOWED_S:g} s")
    return 1 if latest > ALLOWED_S else 0


if __name__ == "__main__":
    sys.exit(main())
