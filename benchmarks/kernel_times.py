"""Which GPU kernels a model's time goes to: one token at batch 1, 64 and 256, and prefill.

    python benchmarks/kernel_times.py OUT/low-rank-0.25

DIR needs a config only, as `forms.py` and `make_shape.py` write it: the weights are dummies. For
each load the microseconds a step, by the clock and in kernels, and for each kernel those, how many
times it runs in a step, the microseconds of one run, and its name.
"""

import argparse
import os
import time
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

INPUT, STEPS, SHOWN = 128, 16, 25
# Name, prompts, tokens of each, steps; a step of decoding is the difference of two lengths.
LOADS = (
    ("batch 1", 1, INPUT, STEPS),
    ("batch 64", 64, INPUT, STEPS),
    ("batch 256", 256, INPUT, STEPS),
    ("prefill", 4, 2048, 0),
)


def kernel_times(
    llm: Any, prompts: int, length: int, output: int
) -> tuple[float, Counter[str], Counter[str]]:
    """Return the seconds by the clock, and by kernel the number of runs and the microseconds."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    batch: list[Any] = [
        {"prompt_token_ids": [(7 * place + 31 * prompt) % 32000 for place in range(length)]}
        for prompt in range(prompts)
    ]
    llm.generate(batch, sampling, use_tqdm=False)
    start = time.perf_counter()
    llm.generate(batch, sampling, use_tqdm=False)
    clock = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        llm.generate(batch, sampling, use_tqdm=False)
    runs: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            runs[event.name] += 1
            times[event.name] += event.device_time
    return clock, runs, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument(
        "--quantization", help="of the linears, by vLLM while it loads: fp8_per_channel"
    )
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profiler sees this process only
    from vllm import LLM

    llm = LLM(
        model=options.directory,
        load_format="dummy",
        dtype="bfloat16",
        quantization=options.quantization,
        max_model_len=2064,
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    for name, prompts, length, steps in LOADS:
        clock, runs, times = kernel_times(llm, prompts, length, steps + 1)
        if steps:
            first_clock, first_runs, first_times = kernel_times(llm, prompts, length, 1)
            clock -= first_clock
            runs.subtract(first_runs)
            times.subtract(first_times)
        each = steps or 1
        inside = sum(times.values()) / each
        print(f"{name}: {clock / each * 1e6:.0f} µs a step, {inside:.0f} µs in kernels")
        for kernel, spent in times.most_common(SHOWN):
            count, one = runs[kernel] / each, spent / max(runs[kernel], 1)
            print(f"{spent / each:10.1f} {count:6.1f} × {one:8.2f}  {kernel[:110]}")


if __name__ == "__main__":
    main()
