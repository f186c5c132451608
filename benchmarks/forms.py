"""What each form of a sliced model costs in vLLM: shapes with dummy weights, dense against sliced.

    python benchmarks/forms.py llama-2-7b OUT --fraction 0.25
    python benchmarks/forms.py opt-13b phi-2 OUT --fraction 0.2 0.3 --rotation low-rank
    python benchmarks/forms.py llama-2-70b OUT --fraction 0.2 0.25 0.3 --tensor-parallel 2 \\
        --fewer 1 --gpus 2

Every row runs in a process of its own, forked from one that has imported vLLM, and is kept in
OUT/rows.jsonl, so that a run that was stopped goes on where it was (give another OUT with another
--rank, --round-to or --gpu-memory-utilization); the table comes last, with the ratio to the first
row of the same shape and quantisation in parentheses. `--fewer N` adds the sliced models on N GPUs;
`--gpus` says how many this machine has (the first of CUDA_VISIBLE_DEVICES, where that is set): rows
that need fewer run beside each other.
`--quantization` takes what vLLM quantises by while it loads (fp8_per_channel, …), and stored-int8,
stored-w4a16 and stored-fp8 for what `sliceserve quantize` stores. With `--adapter RANK` every
request uses a LoRA adapter of that rank, of every linear of the layers.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from make_shape import (
    ROTATIONS,
    adapter_options,
    write_adapter,
    write_dense_shape,
    write_sliced_shape,
)
from shapes import SHAPES
from tqdm import tqdm

from sliceserve.slicing.checkpoint import read_sliced_config
from sliceserve.slicing.packing import Packer
from sliceserve.slicing.quantised import SCHEMES

MARK, STORED = "ROW ", "stored-"
# What takes most of a process's start and touches no GPU.
PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "sliceserve.server.dummies"]
INPUT, STEPS = 128, 128
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256]
NAMES = {"dense": "whole rotations", "low-rank": "low-rank", "shared": "shared basis"}
COLUMNS = {
    "shape": "shape",
    "name": "form",
    "gpus": "GPUs",
    "parameters": "parameters",
    "batch_1": "ms/token, batch 1",
    "batch_64": "ms/step, batch 64",
    "prefill": "prefill tok/s, 16×2048",
    "throughput": "tok/s, 256 × (128 in, 256 out)",
    "kv_tokens": "KV cache, tokens",
    "gpu_ms": "GPU-ms/token, batch 1",
    "gpu_ms_64": "GPU-ms/token, batch 64",
    "startup": "ready after, s",
}


@dataclass(frozen=True)
class Row:
    """One model on some GPUs."""

    shape: str
    name: str
    directory: Path
    parameters: int
    tensor_parallel: int
    pipeline_parallel: int
    quantization: str | None = None
    stored: bool = False
    adapter: int | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs it runs on."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def key(self) -> str:
        """A name of its own."""
        parallel = f"tp{self.tensor_parallel} pp{self.pipeline_parallel}"
        return f"{self.shape} {self.label} {parallel}"

    @property
    def label(self) -> str:
        """What the table calls it."""
        label = f"{self.name}, {self.quantization}" if self.quantization else self.name
        return f"{label}, adapter of rank {self.adapter}" if self.adapter else label


def measure(row: Row, utilization: float, full: bool, repeats: int) -> dict[str, Any]:
    """Measure a model, best of `repeats` runs, on the GPUs that this process sees."""
    # What is sent to the workers is a function.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM, SamplingParams

    from sliceserve.server.dummies import keep_stream

    adapter, options = adapter_options(row.directory, row.adapter)
    start = time.perf_counter()
    llm = LLM(
        model=str(row.directory),
        load_format="dummy",
        dtype="bfloat16",
        quantization=None if row.stored else row.quantization,
        max_model_len=2064,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=utilization,
        tensor_parallel_size=row.tensor_parallel,
        pipeline_parallel_size=row.pipeline_parallel,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": CAPTURED},
        **options,
    )
    llm.apply_model(keep_stream)
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "startup": time.perf_counter() - start,
    }

    def seconds(prompts: int, length: int, output: int, repeats: int = repeats) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        times = []
        for repeat in range(repeats):
            batch: list[Any] = [
                {
                    "prompt_token_ids": [
                        (7919 * (position + 31 * prompt + 7 * repeat)) % 32000
                        for position in range(length)
                    ]
                }
                for prompt in range(prompts)
            ]
            start = time.perf_counter()
            llm.generate(batch, sampling, use_tqdm=False, lora_request=adapter)
            times.append(time.perf_counter() - start)
        return min(times)

    for batch in (1, 64):
        # The difference of two lengths leaves out the prompts' prefill.
        seconds(batch, INPUT, 2, 1)
        took = seconds(batch, INPUT, STEPS + 1) - seconds(batch, INPUT, 1)
        result[f"batch_{batch}"] = took / STEPS * 1e3
    result["prefill"] = 16 * 2048 / seconds(16, 2048, 1)
    if full:
        result["throughput"] = 256 * 256 / seconds(256, INPUT, 256)
    return result


def plan(options: argparse.Namespace) -> list[Row]:
    """Write the configs and list the rows of every shape: the dense model first."""
    return [row for shape in options.shape for row in plan_shape(shape, options)]


def plan_shape(shape: str, options: argparse.Namespace) -> list[Row]:
    """Write the configs of a shape, in a folder of its own, and list its rows."""
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    work: Path = options.output / shape
    dense = write_dense_shape(shape, work / "dense")
    rows = [Row(shape, "dense", work / "dense", dense, tensor, pipeline)]
    for fraction in options.fraction:
        for rotation in options.rotation:
            name = f"{fraction:.0%} {NAMES[rotation]}"
            directory = work / f"{rotation}-{fraction}"
            count = write_sliced_shape(
                shape, directory, fraction, rotation, options.round_to, options.rank
            )
            rows.append(Row(shape, name, directory, count, tensor, pipeline))
        if options.fewer:
            few = rows[-len(options.rotation) :]
            rows += [
                replace(row, tensor_parallel=options.fewer, pipeline_parallel=1) for row in few
            ]
    rows = [replace(row, adapter=options.adapter) for row in rows]
    for directory in {row.directory for row in rows if options.adapter}:
        write_adapter(directory, options.adapter)
    return [
        quantised(row, name, rows[-1].directory) for name in options.quantization for row in rows
    ]


def quantised(row: Row, quantization: str, sliced: Path) -> Row:
    """Return the row with its linears quantised; `sliced` is a directory to describe them by."""
    if quantization == "none":
        return row
    stored = quantization.startswith(STORED)
    directory = row.directory
    if stored:
        directory = directory.with_name(f"{directory.name}-{quantization}")
        shutil.copytree(row.directory, directory, dirs_exist_ok=True)
        file = directory / "config.json"
        scheme = SCHEMES[quantization.removeprefix(STORED)]
        fields = Packer(scheme).fields(read_sliced_config(sliced))
        config = json.loads(file.read_text()) | {"quantization_config": fields}
        file.write_text(json.dumps(config, indent=2) + "\n")
    return replace(row, quantization=quantization, stored=stored, directory=directory)


def run_rows(rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Run the rows, as many at once as fit on the GPUs; return the results by key."""
    record: Path = options.output / "rows.jsonl"
    done: dict[str, Any] = {}
    if record.exists():
        done = {row["key"]: row for row in map(json.loads, record.read_text().splitlines())}
    waiting = [row for row in rows if row.key not in done]
    if options.only:
        waiting = [row for row in waiting if any(text in row.key for text in options.only)]
    free, running = set(visible_gpus(options.gpus)), []
    end = time.monotonic() + options.time_limit
    with tqdm(total=len(waiting), desc="rows", unit="row") as bar:
        while waiting or running:
            fitting = [row for row in waiting if row.gpus <= len(free)]
            if fitting and time.monotonic() < end:
                row = fitting[0]
                waiting.remove(row)
                taken = [free.pop() for _ in range(row.gpus)]
                running.append((row, taken, start_row(row, taken, options)))
            for entry in running[:]:
                row, taken, process = entry
                if process.exitcode is None:
                    continue
                running.remove(entry)
                free.update(taken)
                log = log_of(row, options).read_text(errors="replace")
                lines = [line for line in log.splitlines() if line.startswith(MARK)]
                if lines:
                    done[row.key] = {"key": row.key} | json.loads(lines[-1].removeprefix(MARK))
                    with record.open("a") as file:
                        file.write(json.dumps(done[row.key]) + "\n")
                    tqdm.write(f"{row.key}: {lines[-1].removeprefix(MARK)}")
                else:
                    tqdm.write(f"{row.key} failed: {reason(log)}")
                bar.update()
            if not running and time.monotonic() >= end:
                break
            time.sleep(0.2)
    return done


def visible_gpus(count: int) -> list[str]:
    """Return what CUDA calls the first GPUs that this process may use, at most `count`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else filter(None, visible.split(","))
    return list(names)[:count]


def log_of(row: Row, options: argparse.Namespace) -> Path:
    """Where a row's process writes."""
    path: Path = options.output / (
        row.key.replace(" ", "_").replace("%", "").replace(",", "") + ".log"
    )
    return path


def reason(log: str) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line]
    return lines[-1][-400:] if lines else log[-400:]


def start_row(row: Row, gpus: list[str], options: argparse.Namespace) -> ForkServerProcess:
    """Start the measurement of a row on some GPUs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_row, args=(row, gpus, options))
    process.start()
    return process


def run_row(row: Row, gpus: list[str], options: argparse.Namespace) -> None:
    """Measure a model in this process; what is printed goes to the row's log."""
    with log_of(row, options).open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(gpus))
    if row.gpus == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    full = not options.no_throughput
    result = measure(row, options.gpu_memory_utilization, full, options.repeats)
    print(MARK + json.dumps(result), flush=True)


def table(rows: list[Row], done: dict[str, Any]) -> str:
    """Return the rows as Markdown, times and rates with their ratio to the first alike."""
    lines = [f"| {' | '.join(COLUMNS.values())} |"]
    lines.append(f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}")
    firsts: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        if row.key not in done:
            continue
        values = done[row.key] | {
            "shape": row.shape,
            "name": row.label + (" (pipeline)" if row.pipeline_parallel > 1 else ""),
            "gpus": row.gpus,
            "parameters": row.parameters,
            "gpu_ms": row.gpus * done[row.key]["batch_1"],
            "gpu_ms_64": row.gpus * done[row.key]["batch_64"] / 64,
        }
        first = firsts.setdefault((row.shape, row.quantization), values)
        cells = []
        for key in COLUMNS:
            value = values.get(key)
            if value is None:
                cells.append("")
            elif isinstance(value, float):
                text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
                same = values is first or key not in first
                cells.append(text if same else f"{text} ({value / first[key]:.3f})")
            else:
                cells.append(value if isinstance(value, str) else f"{value:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", nargs="+", choices=SHAPES)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.25])
    parser.add_argument("--rotation", choices=ROTATIONS, nargs="+", default=list(ROTATIONS))
    parser.add_argument("--rank", type=int, help="of low-rank rotations (default: the slicer's)")
    parser.add_argument("--round-to", type=int, default=128)
    parser.add_argument(
        "--quantization",
        nargs="+",
        default=["none"],
        help=f"of the linears: none, what vLLM makes while it loads, or {STORED}SCHEME",
    )
    parser.add_argument("--adapter", type=int, metavar="RANK", help="of LoRA, in every request")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--fewer", type=int, help="GPUs for a second run of each sliced model")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3, help="of each run, the best counts")
    parser.add_argument("--no-throughput", action="store_true", help="leave that column out")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose name has one of these"
    )
    parser.add_argument(
        "--time-limit", type=float, default=1e9, help="seconds; starts no row after"
    )
    options = parser.parse_args()
    for name in options.quantization:
        if name.startswith(STORED) and name.removeprefix(STORED) not in SCHEMES:
            parser.error(f"--quantization {name}: a scheme is one of {', '.join(SCHEMES)}")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    if options.adapter is not None and options.adapter < 1:
        parser.error(f"--adapter {options.adapter}: at least 1")
    needed = max(options.tensor_parallel * options.pipeline_parallel, options.fewer or 1)
    if needed > (found := len(visible_gpus(options.gpus))):
        parser.error(f"--gpus {options.gpus}: a row needs {needed} and {found} can be used")
    rows = plan(options)
    done = run_rows(rows, options)
    print(table(rows, done))
    return 0 if all(row.key in done for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
