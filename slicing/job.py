"""One slicing job: from a model's name to a finished checkpoint directory."""

import importlib.metadata
import json
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sliceserve.slicing.calibration import Text, pick_windows, read_text, token_windows
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    CheckpointSummary,
    read_checkpoint_summary,
    staged_directory,
)
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.dense import DenseModel, open_dense_model
from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.memory import peak_bytes, signal_budget
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.parts import PartWriter, assemble_shards, remove_shards
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.slicer import Slicer, sliced_width
from sliceserve.slicing.source import copy_tokenizer, load_tokenizer
from sliceserve.slicing.stopwatch import Stopwatch

METHOD = "SliceGPT (arXiv 2401.15024): sequential PCA, dense rotations, full-width head"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class SliceOptions:
    """What to slice and how; the fields are the options of `sliceserve slice`.

    Attributes:
        fraction: of hidden_size to delete, in [0, 1).
        calibration: the name of a shipped text, or a file.
        samples: calibration windows.
        sequence_length: tokens in a window.
        round_to: the width kept is a multiple of this.
        dtype: of the stored weights; None keeps the source's (bfloat16 for a GGUF file).
        memory_limit: bytes of host memory; None takes most of what is available.
        resume: keep what is unfinished when the run ends early, and go on from it.

    """

    model: str
    output: Path
    fraction: float = 0.25
    calibration: str = "wikitext2-excerpt"
    samples: int = 64
    sequence_length: int = 2048
    round_to: int = 8
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    memory_limit: int | None = None
    resume: bool = False


@dataclass(frozen=True)
class SliceRun:
    """A finished run.

    Attributes:
        summary: of the checkpoint written.
        stopwatch: where the time went.
        signals_home: where the calibration signals were kept.
        peak_bytes: the largest memory the process has held.

    """

    summary: CheckpointSummary
    stopwatch: Stopwatch
    signals_home: str
    peak_bytes: int


def run_slice(options: SliceOptions, show_progress: bool = True) -> SliceRun:
    """Slice a model into `options.output`, which appears only when it is complete.

    Raises:
        UserError: anything the user gave that cannot be used; nothing is left behind.

    """
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already")
    device = checked_device(options.device)
    text = read_text(options.calibration, "--calibration")
    model = open_dense_model(options.model)
    width = sliced_width(model.config.hidden_size, options.fraction, options.round_to)
    tokenizer = load_tokenizer(model.location)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and options.sequence_length > limit:
        raise UserError(
            f"--sequence-length {options.sequence_length} is more than the {limit} positions "
            f"of MODEL {options.model!r}"
        )
    windows = pick_windows(
        text,
        token_windows(text, tokenizer, options.sequence_length),
        options.samples,
        options.seed,
        "--calibration",
    )
    dtype = getattr(torch, options.dtype) if options.dtype else model.dtype
    places = model.architecture.places(model.config.num_hidden_layers)
    widths = [width] * (places - 1) + [model.config.hidden_size]
    config = sliced_config(
        model.config,
        model.architecture,
        widths,
        model.parameters,
        str(dtype).removeprefix("torch."),
    )
    numbers = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    forward_dtype = torch.float32 if device.type == "cpu" else model.dtype
    signal_bytes = signal_budget(model, options.memory_limit, device, dtype)
    job = describe_job(options, text, forward_dtype)
    files = {file.name: [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in model.files}
    # The weights, and the signals three times: spilled, saved, and saved anew.
    room = numbers * dtype.itemsize
    room += 3 * windows.numel() * widths[-1] * forward_dtype.itemsize
    with (
        staged_directory(options.output, room, options.resume) as staging,
        ThreadPoolExecutor(1) as hasher,
    ):
        progress = Progress(staging / UNFINISHED, job | {"source files": files})
        if not progress.part_bytes:
            remove_shards(staging)
        sha256 = hasher.submit(model.sha256)
        with PartWriter(progress.directory, dtype) as writer, within_memory(device):
            slicer = Slicer(model, widths, writer, device, forward_dtype, signal_bytes)
            slicer.run(windows, progress, show_progress)
        with slicer.stopwatch("writing"):
            assemble_shards(progress.directory, staging, progress.part_bytes)
        config.save_pretrained(staging)
        copy_tokenizer(model.location, staging)
        copy_generation_config(model, staging)
        source = {
            "model": options.model,
            "files": list(files),
            "sha256": sha256.result(),
            "parameters": model.parameters,
        }
        record = {"method": METHOD, "source": source, **job}
        (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        read_checkpoint_summary(staging)
        shutil.rmtree(progress.directory)
    summary = read_checkpoint_summary(options.output)
    return SliceRun(summary, slicer.stopwatch, slicer.signals.home, peak_bytes())


def copy_generation_config(model: DenseModel, staging: Path) -> None:
    """Copy the generation defaults (end-of-sequence ids, sampling), or derive them."""
    path = model.location.directory / "generation_config.json"
    if not model.location.gguf_file and path.is_file():
        (staging / path.name).write_bytes(path.read_bytes())
        return
    generation = transformers.GenerationConfig.from_model_config(model.config)
    generation.save_pretrained(staging)


def describe_job(options: SliceOptions, text: Text, forward_dtype: torch.dtype) -> dict[str, Any]:
    """Return what determines the result beside the source, as plain JSON."""
    chosen = asdict(options)
    for name in ("output", "memory_limit", "resume"):
        del chosen[name]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("sliceserve", "torch", "transformers", "safetensors", "numpy")
    }
    return {
        "calibration": {"text": text.name, "sha256": text.sha256},
        "options": chosen,
        "forward_dtype": str(forward_dtype).removeprefix("torch."),
        "versions": versions | {"python": platform.python_version()},
    }
