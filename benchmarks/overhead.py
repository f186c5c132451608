"""What our layers cost: `sliceserve serve` against vLLM's own server, with the same model.

    python benchmarks/overhead.py DIR --rounds 100

Both servers run on this machine, on its GPU if it has one, and are asked in turns, a few seconds
each, so that what disturbs the machine meets both: requests one at a time, then many at once, all
streamed and with prompts of their own, sent by what `vllm bench serve` sends them with. Neither
writes a line a request. A round gives one difference; shown are their medians and between what
bounds these lie with 95 % confidence. The smaller the model, the more the layers weigh. An
interrupt ends it with the rounds that are done.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import numpy as np
from serving import KEY, NAME, SLICESERVE, VLLM, Server, served
from tqdm import tqdm
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)
from vllm.platforms import current_platform

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32
ALONE, AT_ONCE = 8, 128
WARM_UP = 3
FIGURES = (
    "latency, ms",
    "TTFT, ms",
    "CPU of the API's process, ms a request",
    f"{AT_ONCE} at once: requests/s",
    f"{AT_ONCE} at once: CPU of the API's process, ms a request",
    f"{AT_ONCE} at once: parts of an answer",
)


def prompts_of(directory: Path) -> Iterator[list[int]]:
    """Random tokens of the model without an end; no two prompts share a prefix worth caching."""
    tokens = json.loads((directory / "config.json").read_text())["vocab_size"]
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(tokens, size=PROMPT_TOKENS).tolist()


async def ask(
    session: aiohttp.ClientSession, server: Server, prompt: list[int]
) -> RequestFuncOutput:
    request = RequestFuncInput(
        prompt=prompt,
        api_url=f"{server.url}/v1/completions",
        prompt_len=PROMPT_TOKENS,
        output_len=OUTPUT_TOKENS,
        model=NAME,
        ignore_eos=True,
    )
    output = await async_request_openai_completions(request, session)
    if not output.success:
        sys.exit(f"a request failed: {output.error}")
    return output


async def measure(
    session: aiohttp.ClientSession, server: Server, prompts: Iterator[list[int]]
) -> list[float]:
    """Return one server's figures of one round."""
    cpu = [server.cpu_seconds()]
    alone = [await ask(session, server, next(prompts)) for _ in range(ALONE)]
    cpu.append(server.cpu_seconds())
    began = time.perf_counter()
    many = await asyncio.gather(*(ask(session, server, next(prompts)) for _ in range(AT_ONCE)))
    seconds = time.perf_counter() - began
    cpu.append(server.cpu_seconds())
    return [
        1e3 * float(np.median([one.latency for one in alone])),
        1e3 * float(np.median([one.ttft for one in alone])),
        1e3 * (cpu[1] - cpu[0]) / ALONE,
        AT_ONCE / seconds,
        1e3 * (cpu[2] - cpu[1]) / AT_ONCE,
        float(np.mean([1 + len(one.itl) for one in many])),
    ]


async def measure_in_turns(servers: list[Server], directory: Path, rounds: int) -> np.ndarray:
    """Return the figures, of shape (servers, rounds, figures); fewer rounds after an interrupt."""
    prompts = prompts_of(directory)
    found, done = np.zeros((len(servers), rounds, len(FIGURES))), 0
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    timeout = aiohttp.ClientTimeout(total=600)
    # Shorter than the servers', which would close a connection as it is used again.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for number in tqdm(range(-WARM_UP, rounds), unit="round"):
            places = range(len(servers))
            for place in places if number % 2 else reversed(places):
                figures = await measure(session, servers[place], prompts)
                if number >= 0:
                    found[place, number] = figures
            done = max(0, number + 1)
            if interrupted.is_set():
                break
    return found[:, :done]


def median_and_bounds(values: np.ndarray, form: str) -> str:
    """Write the median and where 95 % of the medians of rounds drawn anew lie."""
    drawn = np.random.default_rng(0).choice(values, (5000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return f"{np.median(values):{form}} ({low:{form}} to {high:{form}})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--options", type=shlex.split, default=["--dtype", "float32", "--enforce-eager"],
        help="of both servers, in one argument",
    )  # fmt: skip
    options = parser.parse_args()
    directory = str(options.directory)
    os.environ["OPENAI_API_KEY"] = KEY
    if current_platform.is_cpu():
        # vLLM else has another process, which waits for the engine without ever sleeping.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with ExitStack() as running:
        theirs = [*VLLM, "serve", directory, *options.options, "--disable-uvicorn-access-log"]
        ours = [
            *SLICESERVE, "serve", directory, *options.options,
            "--disable-uvicorn-access-log", "--access-log", "off",
        ]  # fmt: skip
        servers = [
            running.enter_context(served(theirs, "/health")),
            running.enter_context(served(ours, "/readyz")),
        ]
        found = asyncio.run(measure_in_turns(servers, options.directory, options.rounds))
    if not found.size:
        sys.exit("interrupted before a round was done")
    print(f"| median of {found.shape[1]} | vLLM | sliceserve | difference | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for place, figure in enumerate(FIGURES):
        vllm, sliceserve = found[:, :, place]
        print(
            f"| {figure} | {np.median(vllm):.2f} | {np.median(sliceserve):.2f} "
            f"| {median_and_bounds(sliceserve - vllm, '+.2f')} "
            f"| {median_and_bounds(sliceserve / vllm, '.3f')} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
