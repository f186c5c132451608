"""Whether a model's answers depend on what else is in the batch, with and without vLLM's switch.

    python benchmarks/invariance.py DIR [DIR ...]

vLLM promises answers that do not where VLLM_BATCH_INVARIANT=1. Each model answers prompts of many
lengths greedily, one at a time and then all at once, in a process of its own for each setting; the
table says how many answers had the same tokens, and how many the same logprobs to the last bit.
Token ids are below 250, so that models of any vocabulary will do. It wants a GPU: on CPUs vLLM 0.32
has no kernels for its switch.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

SETTINGS = ("0", "1")
Answer = list[tuple[int, float]]


def answers(directory: Path, invariant: str, dtype: str, prompts: int, output: int) -> list[Any]:
    """Return the tokens and logprobs of each prompt, alone and then among the others."""
    os.environ |= {"VLLM_BATCH_INVARIANT": invariant, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(directory),
        dtype=dtype,
        max_model_len=16 * prompts + output,
        max_num_seqs=2 * prompts,
        gpu_memory_utilization=0.3,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=output, ignore_eos=True, detokenize=False, logprobs=1
    )
    batch: list[Any] = [
        {"prompt_token_ids": [(7 * i + 13 * p) % 249 + 1 for i in range(5 + 11 * p)]}
        for p in range(prompts)
    ]

    def read(outputs: list[Any]) -> list[Answer]:
        found = [output.outputs[0] for output in outputs]
        return [
            [
                (token, scores[token].logprob)
                for token, scores in zip(one.token_ids, one.logprobs, strict=True)
            ]
            for one in found
        ]

    alone = [read(llm.generate([prompt], sampling, use_tqdm=False))[0] for prompt in batch]
    return list(zip(alone, read(llm.generate(batch, sampling, use_tqdm=False)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output", type=int, default=48, help="tokens a prompt")
    options = parser.parse_args()
    lines = ["| model | VLLM_BATCH_INVARIANT | same tokens | same logprobs | of |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    runs = [(model, setting) for model in options.model for setting in SETTINGS]
    for model, setting in tqdm(runs, desc="runs", unit="run"):
        arguments = (model, setting, options.dtype, options.prompts, options.output)
        # What vLLM reads of the environment it reads once a process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pairs = pool.submit(answers, *arguments).result()
        tokens = sum([a for a, _ in alone] == [b for b, _ in among] for alone, among in pairs)
        exactly = sum(alone == among for alone, among in pairs)
        cells = (model.name, setting, tokens, exactly, len(pairs))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
