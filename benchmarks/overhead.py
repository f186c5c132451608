"""What our layers cost: `sliceserve serve` against vLLM's own server, with the same model.

    python benchmarks/overhead.py DIR --rounds 5

Both servers run on this machine, one at work at a time, in turns; `vllm bench serve` asks them,
one request at a time and many. The smaller the model, the more the layers weigh.
"""

import argparse
import shlex
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from serving import SLICESERVE, VLLM, bench, served
from tqdm import tqdm

LENGTHS = 64, 32
# Name of the figure, key in the result of `vllm bench serve`, and requests at a time.
FIGURES = (
    ("latency, ms", "median_e2el_ms", 1),
    ("TTFT, ms", "median_ttft_ms", 1),
    ("CPU of the API's process, ms a request", "cpu_ms", 1),
    ("requests/s, 64 at a time", "request_throughput", 64),
    ("CPU of the API's process, ms a request, 64 at a time", "cpu_ms", 64),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--options", type=shlex.split, default=["--dtype", "float32", "--enforce-eager"],
        help="of both servers, in one argument",
    )  # fmt: skip
    options = parser.parse_args()
    directory = str(options.directory)
    commands = {
        "vLLM": ([*VLLM, "serve", directory, *options.options], "/health"),
        "sliceserve": (
            [*SLICESERVE, "serve", directory, *options.options, "--access-log", "/dev/null"],
            "/readyz",
        ),
    }
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as running, tqdm(total=2 * 2 * (options.rounds + 1), unit="run") as bar:
        servers = {
            name: running.enter_context(served(*command)) for name, command in commands.items()
        }
        for number in range(options.rounds + 1):
            for server in list(servers)[:: 1 if number % 2 else -1]:
                for at_once in sorted({at_once for *_, at_once in FIGURES}):
                    result = bench(
                        servers[server], options.directory, at_once, options.requests, LENGTHS
                    )
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
