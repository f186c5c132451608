"""Which GPU kernels a model's time goes to: one token at batch 1, 64 and 256, and prefill.

    python benchmarks/kernel_times.py OUT/llama-2-7b/low-rank-0.25

DIR needs a config only, as `forms.py` and `make_shape.py` write it: the weights are dummies. For
each load the microseconds a step, by the clock and in kernels, and for each kernel those, how many
times it runs in a step, the microseconds of one run, and its name. The clock is read in the run
whose kernels are recorded, and in one without a recording: a GPU at its limit of power slows down
while it runs, so that kernels do not take the same time in both. With `--adapter RANK` every
request uses a LoRA adapter of that rank, of every linear of the layers.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from make_shape import adapter_options, write_adapter
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
    llm: Any, prompts: int, length: int, output: int, adapter: Any
) -> tuple[list[float], Counter[str], Counter[str]]:
    """Return seconds by the clock, without and with recording, and kernels' runs and µs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    batch: list[Any] = [
        {"prompt_token_ids": [(7 * place + 31 * prompt) % 32000 for place in range(length)]}
        for prompt in range(prompts)
    ]
    llm.generate(batch, sampling, use_tqdm=False, lora_request=adapter)
    clocks = [time.perf_counter()]
    llm.generate(batch, sampling, use_tqdm=False, lora_request=adapter)
    clocks[0] = time.perf_counter() - clocks[0]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        clocks.append(time.perf_counter())
        llm.generate(batch, sampling, use_tqdm=False, lora_request=adapter)
        clocks[1] = time.perf_counter() - clocks[1]
    runs: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            runs[event.name] += 1
            times[event.name] += event.device_time
    return clocks, runs, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--quantization", help="of the linears, by vLLM while it loads: fp8_per_channel"
    )
    parser.add_argument("--adapter", type=int, metavar="RANK", help="of LoRA, in every request")
    options = parser.parse_args()
    if options.adapter is not None and options.adapter < 1:
        parser.error(f"--adapter {options.adapter}: at least 1")
    if not (options.directory / "config.json").is_file():
        parser.error(f"DIR {options.directory}: has no config.json")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profiler sees this process only
    from vllm import LLM

    from sliceserve.server.dummies import keep_stream

    if options.adapter:
        write_adapter(options.directory, options.adapter)
    adapter, lora = adapter_options(options.directory, options.adapter)
    llm = LLM(
        model=str(options.directory),
        load_format="dummy",
        dtype="bfloat16",
        quantization=options.quantization,
        max_model_len=2064,
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **lora,
    )
    llm.apply_model(keep_stream)
    for name, prompts, length, steps in LOADS:
        clocks, runs, times = kernel_times(llm, prompts, length, steps + 1, adapter)
        if steps:
            firsts, first_runs, first_times = kernel_times(llm, prompts, length, 1, adapter)
            clocks = [clock - first for clock, first in zip(clocks, firsts, strict=True)]
            runs.subtract(first_runs)
            times.subtract(first_times)
        each = steps or 1
        inside = sum(times.values()) / each
        alone, recorded = (clock / each * 1e6 for clock in clocks)
        print(f"{name}: {alone:.0f} µs a step; {recorded:.0f} recorded, {inside:.0f} in kernels")
        for kernel, spent in times.most_common(SHOWN):
            count, one = runs[kernel] / each, spent / max(runs[kernel], 1)
            print(f"{spent / each:10.1f} {count:6.1f} × {one:8.2f}  {kernel[:110]}")


if __name__ == "__main__":
    main()
