"""Tokens per second of a model through vLLM, offline, batch after batch of random prompts.

    python benchmarks/throughput.py DIR [DIR ...] [--requests 8 --input 64 --output 64]

Every model runs in a process of its own; the best of `--repeats` is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measure(options: argparse.Namespace, directory: Path) -> Iterator[tuple[int, float]]:
    """Yield the requests in a batch and the generated tokens per second, best of the repeats."""
    from vllm import LLM, SamplingParams

    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    llm = LLM(
        model=str(directory),
        dtype=options.dtype,
        load_format=options.load_format,
        enforce_eager=options.enforce_eager,
        max_model_len=options.input + options.output,
        max_num_seqs=max(options.requests),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=options.output, ignore_eos=True, detokenize=False
    )
    for requests in options.requests:
        ids = [7919 * index % vocabulary for index in range(requests * options.input)]
        prompts: list[Any] = [
            {"prompt_token_ids": ids[start : start + options.input]}
            for start in range(0, len(ids), options.input)
        ]
        times = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - start)
        yield requests, requests * options.output / min(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--requests", type=int, nargs="+", default=[8], help="prompts in a batch")
    parser.add_argument("--input", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy for random weights")
    parser.add_argument("--enforce-eager", action="store_true")
    options = parser.parse_args()
    if len(options.directories) == 1:
        for requests, rate in measure(options, options.directories[0]):
            print(f"{rate:.1f} tokens/s, {requests} requests, {options.directories[0]}", flush=True)
        return 0
    flags = sys.argv[1:]
    for directory in options.directories:
        flags.remove(str(directory))
    for directory in options.directories:
        command = [sys.executable, __file__, str(directory), *flags]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            return result.returncode
        lines = [line for line in result.stdout.splitlines() if " tokens/s, " in line]
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.exit(main())
