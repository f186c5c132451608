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
from pathlib import Path
from typing import Any


def measure(options: argparse.Namespace, directory: Path) -> float:
    """Return generated tokens per second, the best of several repeats."""
    from vllm import LLM, SamplingParams

    config = json.loads((directory / "config.json").read_text())
    llm = LLM(
        model=str(directory),
        dtype=options.dtype,
        load_format=options.load_format,
        enforce_eager=options.enforce_eager,
        max_model_len=options.input + options.output,
        max_num_seqs=options.requests,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=options.output, ignore_eos=True, detokenize=False
    )
    vocabulary = config["vocab_size"]
    prompts: list[Any] = [
        {"prompt_token_ids": [(7919 * (i * options.input + j)) % vocabulary
                              for j in range(options.input)]}
        for i in range(options.requests)
    ]  # fmt: skip
    llm.generate(prompts, sampling, use_tqdm=False)
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        times.append(time.perf_counter() - start)
    return float(options.requests * options.output / min(times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--requests", type=int, default=8, help="prompts in the batch")
    parser.add_argument("--input", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy for random weights")
    parser.add_argument("--enforce-eager", action="store_true")
    options = parser.parse_args()
    if len(options.directories) == 1:
        rate = measure(options, options.directories[0])
        print(f"{rate:.1f} tokens/s  {options.directories[0]}", flush=True)
        return 0
    flags = sys.argv[1:]
    for directory in options.directories:
        flags.remove(str(directory))
    for directory in options.directories:
        command = [sys.executable, __file__, str(directory), *flags]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            return result.returncode
        print(result.stdout.splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.exit(main())
