"""What our layers cost: `sliceserve serve` against vLLM's own server, with the same model.

    python benchmarks/overhead.py DIR --rounds 100

Both servers run on this machine, on its GPU if it has one, and are asked in turns, a few seconds
each, so that what disturbs the machine meets both: requests one at a time, then many at once, these
with each of `--lengths`, all streamed and with prompts of their own, sent by what vLLM's own
benchmark sends them with. Neither writes a line a request. A round gives one difference; shown are
their medians, of CPU time their means as it comes in steps of 10 ms, and between what bounds these
lie with 95 % confidence. The smaller the model, the more the layers weigh. The server that starts
first has its engine's memory first, so a difference that changes its sign with `--first` is not the
layers'. What the engine says it took is from its first step for a request to its last. An interrupt
ends it with the rounds that are done.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from serving import KEY, NAME, SLICESERVE, VLLM, Server, served
from tqdm import tqdm
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)
from vllm.platforms import current_platform

ALONE, AT_ONCE = 8, 128
WARM_UP = 3
CPU = "CPU of the API's process, ms a request"
FIGURES_ALONE = ("latency, ms", "of it in the engine, ms", "TTFT, ms", CPU)
ENGINE_SECONDS = "vllm:request_inference_time_seconds_sum"
FIGURES_AT_ONCE = ("requests/s", CPU, "parts of an answer")


class Lengths(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    output: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        prompt, _, output = text.partition(":")
        return cls(int(prompt), int(output))


ALONE_LENGTHS = Lengths(64, 32)


class RequestError(Exception):
    """A request was not answered."""


def figures_of(lengths: list[Lengths]) -> list[str]:
    """Name what a round measures of a server, in the order of `measure`."""
    at_once = [
        f"{AT_ONCE} at once, {one.prompt} tokens in and {one.output} out: {figure}"
        for one in lengths
        for figure in FIGURES_AT_ONCE
    ]
    return [*FIGURES_ALONE, *at_once]


class Prompts:
    """Random tokens of the model; no two prompts share a prefix worth caching."""

    def __init__(self, directory: Path) -> None:
        self._tokens = json.loads((directory / "config.json").read_text())["vocab_size"]
        self._generator = np.random.default_rng(0)

    def draw(self, length: int) -> list[int]:
        drawn: list[int] = self._generator.integers(self._tokens, size=length).tolist()
        return drawn


async def ask(
    session: aiohttp.ClientSession, server: Server, prompt: list[int], tokens: int
) -> RequestFuncOutput:
    request = RequestFuncInput(
        prompt=prompt,
        api_url=f"{server.url}/v1/completions",
        prompt_len=len(prompt),
        output_len=tokens,
        model=NAME,
        ignore_eos=True,
    )
    output = await async_request_openai_completions(request, session)
    if not output.success:
        raise RequestError(output.error)
    return output


async def engine_seconds(session: aiohttp.ClientSession, server: Server) -> float:
    """Return the seconds from first step to last, of all requests that have ended."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with session.get(f"{server.url}/metrics", headers=headers) as answer:
        families = text_string_to_metric_families(await answer.text())
    return sum(
        sample.value for one in families for sample in one.samples if sample.name == ENGINE_SECONDS
    )


async def measure_alone(
    session: aiohttp.ClientSession, server: Server, prompts: Prompts
) -> list[float]:
    """Return one server's figures of requests one at a time."""
    engine = await engine_seconds(session, server)
    cpu = server.cpu_seconds()
    done = [
        await ask(session, server, prompts.draw(ALONE_LENGTHS.prompt), ALONE_LENGTHS.output)
        for _ in range(ALONE)
    ]
    cpu = server.cpu_seconds() - cpu
    return [
        1e3 * float(np.median([one.latency for one in done])),
        1e3 * (await engine_seconds(session, server) - engine) / ALONE,
        1e3 * float(np.median([one.ttft for one in done])),
        1e3 * cpu / ALONE,
    ]


async def measure_at_once(
    session: aiohttp.ClientSession, server: Server, prompts: Prompts, lengths: Lengths
) -> list[float]:
    """Return one server's figures of many requests at once."""
    drawn = [prompts.draw(lengths.prompt) for _ in range(AT_ONCE)]
    cpu, began = server.cpu_seconds(), time.perf_counter()
    done = await asyncio.gather(*(ask(session, server, one, lengths.output) for one in drawn))
    seconds = time.perf_counter() - began
    return [
        AT_ONCE / seconds,
        1e3 * (server.cpu_seconds() - cpu) / AT_ONCE,
        float(np.mean([1 + len(one.itl) for one in done])),
    ]


async def measure(
    session: aiohttp.ClientSession, server: Server, prompts: Prompts, lengths: list[Lengths]
) -> list[float]:
    """Return one server's figures of one round."""
    figures = await measure_alone(session, server, prompts)
    for one in lengths:
        figures += await measure_at_once(session, server, prompts, one)
    return figures


async def measure_in_turns(
    servers: list[Server], prompts: Prompts, lengths: list[Lengths], rounds: int
) -> np.ndarray:
    """Return the figures, of shape (servers, rounds, figures).

    There are fewer rounds after an interrupt, or when a request failed.
    """
    found, done = np.zeros((len(servers), rounds, len(figures_of(lengths)))), 0
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    timeout = aiohttp.ClientTimeout(total=600)
    # Shorter than the servers', which would close a connection as it is used again.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for number in tqdm(range(-WARM_UP, rounds), unit="round"):
            places = range(len(servers))
            try:
                for place in places if number % 2 else reversed(places):
                    figures = await measure(session, servers[place], prompts, lengths)
                    if number >= 0:
                        found[place, number] = figures
            except RequestError as error:
                print(f"a request failed: {error}", file=sys.stderr)
                break
            done = max(0, number + 1)
            if interrupted.is_set():
                break
    return found[:, :done]


def middle_of(figure: str) -> Callable[..., Any]:
    """Return what the middle of a figure's rounds is."""
    return np.mean if figure.endswith(CPU) else np.median


def middle_and_bounds(values: np.ndarray, middle: Callable[..., Any], form: str) -> str:
    """Write the middle and where 95 % of those of rounds drawn anew lie."""
    drawn = np.random.default_rng(0).choice(values, (5000, len(values)))
    low, high = np.quantile(middle(drawn, axis=1), [0.025, 0.975])
    return f"{middle(values):{form}} ({low:{form}} to {high:{form}})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--lengths", type=Lengths.parse, nargs="+", default=[ALONE_LENGTHS], metavar="IN:OUT",
        help="tokens of the requests at once",
    )  # fmt: skip
    parser.add_argument("--first", choices=("vllm", "sliceserve"), default="vllm")
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
        starts = {"vllm": (theirs, "/health"), "sliceserve": (ours, "/readyz")}
        started = {
            name: running.enter_context(served(*starts[name]))
            for name in sorted(starts, key=lambda name: name != options.first)
        }
        servers = [started[name] for name in starts]
        prompts = Prompts(options.directory)
        found = asyncio.run(measure_in_turns(servers, prompts, options.lengths, options.rounds))
    if not found.size:
        sys.exit("no round was done")
    print(f"| middle of {found.shape[1]} | vLLM | sliceserve | difference | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for place, figure in enumerate(figures_of(options.lengths)):
        vllm, sliceserve = found[:, :, place]
        middle = middle_of(figure)
        print(
            f"| {figure} | {middle(vllm):.2f} | {middle(sliceserve):.2f} "
            f"| {middle_and_bounds(sliceserve - vllm, middle, '+.2f')} "
            f"| {middle_and_bounds(sliceserve / vllm, middle, '.3f')} |"
        )
    return 0 if found.shape[1] == options.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
