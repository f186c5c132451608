"""How fast models are on this machine: latency and throughput through vLLM, batch after batch."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from sliceserve.server.failure import loading_fault
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.dense import open_dense_model
from sliceserve.slicing.errors import MachineError, UserError, reason
from sliceserve.slicing.source import Location, locate_all, quiet_transformers, read_json_object


@dataclass(frozen=True)
class SpeedOptions:
    """What is run; the fields are the options of `sliceserve benchmark`, named as vLLM's.

    Attributes:
        batch_size: requests at once, one measurement each.
        input_len: tokens in a prompt.
        output_len: tokens generated for each, at least 2.
        repeats: runs of every batch after one to warm up; the fastest counts.
        dtype: to run in; "auto" takes the stored one.
        load_format: "auto", or "dummy" for random weights.
        tensor_parallel_size: GPUs that share every layer.
        pipeline_parallel_size: GPUs, or groups of them, that take turns.
        gpu_memory_utilization: share of a GPU's memory for vLLM; None takes vLLM's.
        enforce_eager: without compilation and CUDA graphs.
        quantization: what vLLM makes of the weights while it loads, by its name; None leaves them.
        revision: of the one model that is on the hub; None takes its main branch.

    """

    batch_size: tuple[int, ...] = (1, 8, 64)
    input_len: int = 128
    output_len: int = 128
    repeats: int = 3
    dtype: str = "auto"
    load_format: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    quantization: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class BatchSpeed:
    """One batch of equal requests that start together.

    Attributes:
        batch_size: requests.
        ttft: seconds until all of them have their first token.
        itl: seconds between tokens after it.
        output_throughput: tokens generated a second, prompts' time included.
        prompt_throughput: tokens of prompts a second, until all have their first token.

    """

    batch_size: int
    ttft: float
    itl: float
    output_throughput: float
    prompt_throughput: float


@dataclass(frozen=True)
class Speed:
    """What a model takes here.

    Attributes:
        parameters: stored numbers, rotations and head included.
        ready: seconds until the engine takes requests, compilation included.
        kv_cache_tokens: tokens that the KV cache holds.
        device: vLLM's name of what it ran on.
        dtype: that it ran in.
        vllm: the version of vLLM.
        batches: in the order of the options.
        commit: of a model from the hub, 40 hexadecimal digits.

    """

    parameters: int
    ready: float
    kv_cache_tokens: int
    device: str
    dtype: str
    vllm: str
    batches: tuple[BatchSpeed, ...]
    commit: str | None = None


def compare_speed(
    models: Sequence[str], options: SpeedOptions, show_progress: bool = True
) -> dict[str, Speed]:
    """Measure models one after the other, each in a process of its own.

    Args:
        models: dense models or sliced checkpoints; no GGUF files.
        options: what is run.
        show_progress: whether to show a bar.

    Raises:
        UserError: vLLM is not installed, no such model or revision, or vLLM cannot load it.
        MachineError: the hub did not give a model, or an engine did not start or ended early.

    """
    # All names are checked before minutes are spent on the first.
    locations = dict(zip(models, locate_all(models, options.revision), strict=True))
    counts = {model: count_parameters(model, where) for model, where in locations.items()}
    found: dict[str, Speed] = {}
    bar = tqdm(counts.items(), disable=not show_progress, unit="model")
    for model, parameters in bar:
        bar.set_description(f"measuring {model}")
        arguments = (model, locations[model], parameters, options)
        with ProcessPoolExecutor(1, get_context("spawn"), _log_to_stderr) as pool:
            try:
                found[model] = pool.submit(measure_speed, *arguments).result()
            except BrokenProcessPool:
                raise MachineError(
                    f"the process that ran {model!r} ended early: is there enough memory?"
                ) from None
    return found


def _log_to_stderr() -> None:
    """Keep what vLLM prints out of what this command prints."""
    os.dup2(2, 1)


def count_parameters(model: str, location: Location) -> int:
    """Count the numbers that a dense model or a sliced checkpoint stores.

    Args:
        model: its name.
        location: where it lies.

    Raises:
        UserError: not a model, or a GGUF file.

    """
    if location.gguf_file:
        raise UserError(f"MODEL_OR_DIR {model!r} is a GGUF file, which is not measured")
    config = location.directory / "config.json"
    if config.is_file() and read_json_object(config).get("model_type") == MODEL_TYPE:
        return read_checkpoint_summary(location.directory).sliced_parameters
    return open_dense_model(str(location.directory)).parameters


def measure_speed(model: str, location: Location, parameters: int, options: SpeedOptions) -> Speed:
    """Measure one model in this process.

    Args:
        model: its name.
        location: where it lies.
        parameters: that it stores.
        options: what is run.

    Raises:
        UserError: vLLM is not installed, or cannot load the model as the options say.
        MachineError: the engine did not start, or ended while it ran.

    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if options.tensor_parallel_size * options.pipeline_parallel_size == 1:
        # Without a process between, an error comes out as itself.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if options.load_format == "dummy":
        # What is sent to the workers is a function.
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    quiet_transformers()
    start = time.perf_counter()
    engine = _engine(model, location, options)
    config = engine.llm_engine.vllm_config
    try:
        if options.load_format == "dummy":
            from sliceserve.server.dummies import keep_stream

            engine.apply_model(keep_stream)
        ready = time.perf_counter() - start
        batches = _run_batches(engine, config.model_config.get_vocab_size(), options)
    except Exception as error:
        # Everything is caught: options and model were fine when it loaded.
        raise MachineError(f"vLLM failed while it ran {model!r}: {reason(error)}") from error
    import vllm
    from vllm.platforms import current_platform

    cache = config.cache_config
    return Speed(
        parameters,
        ready,
        (cache.num_gpu_blocks or 0) * cache.block_size,
        str(current_platform.get_device_name()),
        str(config.model_config.dtype).removeprefix("torch."),
        vllm.__version__,
        batches,
        location.commit,
    )


def _engine(model: str, location: Location, options: SpeedOptions) -> Any:
    try:
        from vllm import LLM
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    except ImportError as error:
        raise UserError(f"benchmark needs vLLM, which cannot be imported: {error}") from error
    if options.quantization not in (None, *QUANTIZATION_METHODS):
        known = ", ".join(QUANTIZATION_METHODS)
        raise UserError(f"--quantization {options.quantization!r} is none of {known}")
    further: dict[str, Any] = {}
    if options.gpu_memory_utilization is not None:
        further["gpu_memory_utilization"] = options.gpu_memory_utilization
    try:
        return LLM(
            model=str(location.directory),
            dtype=options.dtype,
            load_format=options.load_format,
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            enforce_eager=options.enforce_eager,
            quantization=options.quantization,
            max_model_len=options.input_len + options.output_len,
            max_num_seqs=max(options.batch_size),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **further,
        )
    except Exception as error:
        # Everything is caught: bad models, too little memory, missing kernels, all its own.
        raise loading_fault(error)(f"vLLM cannot load {model!r}: {reason(error)}") from error


def _run_batches(engine: Any, vocabulary: int, options: SpeedOptions) -> tuple[BatchSpeed, ...]:
    """Measure every batch of the options."""
    batches = []
    for size in options.batch_size:
        run = _runner(engine, vocabulary, size, options.input_len)
        run(2)
        ttft = min(run(1) for _ in range(options.repeats))
        whole = min(run(options.output_len) for _ in range(options.repeats))
        itl = (whole - ttft) / (options.output_len - 1)
        tokens, prompts = size * options.output_len, size * options.input_len
        batches.append(BatchSpeed(size, ttft, itl, tokens / whole, prompts / ttft))
    return tuple(batches)


def _runner(
    engine: Any, vocabulary: int, batch_size: int, input_len: int
) -> Callable[[int], float]:
    """Return what runs a batch and gives the seconds it took, for so many tokens generated."""
    from vllm import SamplingParams

    prompts: list[Any] = [
        {
            "prompt_token_ids": [
                7919 * (position + input_len * number) % vocabulary for position in range(input_len)
            ]
        }
        for number in range(batch_size)
    ]

    def run(output_len: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    return run


def short_names(models: Sequence[str]) -> list[str]:
    """Return the last part of every model's name, or the names where these are not different."""
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    return short if len(set(short)) == len(short) else list(models)


def describe_speed(found: dict[str, Speed], options: SpeedOptions) -> str:
    """Return models side by side, with the ratio of each to the first."""
    names = short_names(list(found))
    speeds = list(found.values())
    rows: list[tuple[str, list[float], str]] = [
        ("parameters", [speed.parameters for speed in speeds], ",.0f"),
        ("ready after, s", [speed.ready for speed in speeds], ",.1f"),
        ("KV cache, tokens", [speed.kv_cache_tokens for speed in speeds], ",.0f"),
    ]
    for number, size in enumerate(options.batch_size):
        batches = [speed.batches[number] for speed in speeds]
        rows += [
            (f"batch {size}: TTFT, ms", [batch.ttft * 1e3 for batch in batches], ",.2f"),
            (f"batch {size}: ITL, ms", [batch.itl * 1e3 for batch in batches], ",.2f"),
            (f"batch {size}: tokens/s", [batch.output_throughput for batch in batches], ",.1f"),
            (f"batch {size}: prompt tokens/s", [one.prompt_throughput for one in batches], ",.0f"),
        ]
    header = ["", names[0], *(cell for name in names[1:] for cell in (name, "ratio"))]
    lines = [header]
    for name, values, form in rows:
        cells = [name, format(values[0], form)]
        for value in values[1:]:
            cells += [format(value, form), f"{value / values[0]:.3f}" if values[0] else ""]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    first = speeds[0]
    gpus = options.tensor_parallel_size * options.pipeline_parallel_size
    text.append(
        f"{options.input_len} tokens in, {options.output_len} out, fastest of {options.repeats}; "
        f"{options.quantization or first.dtype}, vLLM {first.vllm} on {gpus} × {first.device}"
    )
    text += [f"{model}: commit {speed.commit}" for model, speed in found.items() if speed.commit]
    return "\n".join(text)
