"""What memory of a GPU models take while vLLM loads them, and afterwards.

    python benchmarks/make_random.py llama-2-7b DENSE --device cuda
    sliceserve slice DENSE --output SLICED --samples 16 --sequence-length 512 --device cuda
    python benchmarks/loading.py DENSE SLICED

Each model is loaded in a process of its own, in the stored dtype, without compilation. The peak is
what torch has allocated at most between the loader's start and its end, without what the engine
had allocated before; of what is loaded, what was asked for leaves out what torch rounds up. The KV
cache and the first step come after; serving takes what was loaded, the KV cache and a step's
activations.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "LOADED "
GB = 1e9
COLUMNS = (
    "model",
    "stored, GB",
    "peak while loading, GB",
    "loaded, GB",
    "asked for, GB",
    "a step more, GB",
    "s",
)
ASKED_FOR = "requested_bytes.all.current"


def measure(directory: Path, quantization: str | None, load_format: str) -> dict[str, float]:
    """Load a model in this process; return gigabytes and seconds."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # torch counts for a process
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    found: dict[str, float] = {}
    load_model = BaseModelLoader.load_model

    def counted(self: BaseModelLoader, *arguments: Any, **named: Any) -> Any:
        before = torch.accelerator.memory_allocated()
        asked_for = torch.cuda.memory_stats()[ASKED_FOR]
        torch.accelerator.reset_peak_memory_stats()
        start = time.perf_counter()
        model = load_model(self, *arguments, **named)
        found["s"] = time.perf_counter() - start
        peak = torch.accelerator.max_memory_allocated()
        found["peak while loading, GB"] = (peak - before) / GB
        found["loaded, GB"] = (torch.accelerator.memory_allocated() - before) / GB
        found["asked for, GB"] = (torch.cuda.memory_stats()[ASKED_FOR] - asked_for) / GB
        torch.accelerator.reset_peak_memory_stats()
        return model

    BaseModelLoader.load_model = counted
    llm = LLM(
        model=str(directory),
        quantization=quantization,
        load_format=load_format,
        max_model_len=2064,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    cache = torch.accelerator.memory_allocated() / GB
    torch.accelerator.reset_peak_memory_stats()
    llm.generate([{"prompt_token_ids": [1] * 2048} for _ in range(4)], use_tqdm=False)
    found["a step more, GB"] = torch.accelerator.max_memory_allocated() / GB - cache
    found["stored, GB"] = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / GB
    return found


def run(directory: Path, quantization: str | None, load_format: str) -> dict[str, Any]:
    """Measure a model in a process of its own."""
    command = [sys.executable, __file__, str(directory), "--here", "--load-format", load_format]
    command += ["--quantization", quantization] if quantization else []
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        sys.exit(f"{directory} was not loaded:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    measured: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    name = f"{directory.name}, {quantization}" if quantization else directory.name
    return {"model": name} | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--quantization", help="by vLLM while it loads: fp8_per_channel")
    parser.add_argument(
        "--load-format",
        default="auto",
        help="dummy: random weights, for a DIR with a config only (make_shape.py)",
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        found = measure(options.directories[0], options.quantization, options.load_format)
        print(MARK + json.dumps(found), flush=True)
        return
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}", flush=True)
    for directory in options.directories:
        row = run(directory, options.quantization, options.load_format)
        cells = [f"{row[name]:.2f}" for name in COLUMNS[1:]]
        print(f"| {row['model']} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
