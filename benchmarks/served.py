"""A sliced model over HTTP: are its answers those of Transformers, and how fast do they stream.

    python benchmarks/served.py DIR --against MODEL --options "--dtype bfloat16"

`sliceserve serve` runs DIR and, before it, vLLM's own server MODEL. Answers are greedy, after
pieces of the WikiText-2 test excerpt; Transformers reads them on the CPU in float32 and says how
many of their tokens it would have chosen too, and how far below its own choice (logprob) the others
are: a tie that the server's dtype decides is not far. Latencies are medians of `vllm bench serve`.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from serving import KEY, NAME, SLICESERVE, VLLM, bench, served
from transformers import AutoModelForCausalLM, AutoTokenizer

import sliceserve.slicing.modeling  # noqa: F401 - Transformers then knows sliced checkpoints
from sliceserve.slicing.corpora import HELD_OUT
from sliceserve.slicing.source import quiet_transformers

FIGURES = {
    "TTFT, ms": "median_ttft_ms",
    "ITL, ms": "median_itl_ms",
    "latency, ms": "median_e2el_ms",
    "tokens/s": "output_throughput",
}


def pieces(directory: Path, count: int, length: int) -> list[list[int]]:
    """Cut pieces out of the text that lie evenly in it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(HELD_OUT.read_text(), add_special_tokens=False)["input_ids"]
    return [
        ids[start : start + length] for start in range(0, len(ids) - length, len(ids) // count)
    ][:count]


def complete(client: OpenAI, prompt: list[int], tokens: int) -> list[int]:
    """Return the tokens of a greedy answer, streamed."""
    stream = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    chunks: list[Any] = [chunk for chunk in stream if chunk.choices]
    return [token for chunk in chunks for token in chunk.choices[0].token_ids or []]


@torch.no_grad()
def gaps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return for each token of an answer how far its logprob is below the likeliest one's."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.max(-1).values - logits[range(len(answer)), answer]


def measure(directory: Path, health: str, command: list[str], options: Any) -> list[str]:
    """Return a row of the table."""
    prompts = pieces(directory, options.prompts, options.input)
    cells = []
    with served([*command, "serve", str(directory), *options.options], health) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        answers = [complete(client, prompt, options.output) for prompt in prompts]
        for at_once in options.at_once:
            lengths = (options.input, options.output)
            result = bench(server, directory, at_once, options.requests * at_once, lengths)
            cells += [f"{result[key]:.2f}" for key in FIGURES.values()]
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    below = torch.cat([gaps(model, *pair) for pair in zip(prompts, answers, strict=True)])
    chosen = f"{(below == 0).sum()} of {below.numel()}"
    return [directory.name, chosen, f"{below.max():.3f}", *cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--against", type=Path, metavar="MODEL", help="its dense parent")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--input", type=int, default=128, help="tokens in a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 64], help="requests")
    parser.add_argument("--requests", type=int, default=8, help="for each that runs at once")
    parser.add_argument(
        "--options", type=shlex.split, default=[], help="of the server, in one argument"
    )
    options = parser.parse_args()
    quiet_transformers()
    columns = [f"{name}, {count} at once" for count in options.at_once for name in FIGURES]
    print(f"| model | tokens as on the CPU | furthest below | {' | '.join(columns)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(columns)}")
    if options.against:
        print(f"| {' | '.join(measure(options.against, '/health', VLLM, options))} |", flush=True)
    print(f"| {' | '.join(measure(options.directory, '/readyz', SLICESERVE, options))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
