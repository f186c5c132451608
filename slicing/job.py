"""One slicing job: from a model's name to a finished checkpoint directory."""

import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from sliceserve.slicing.calibration import check_vocabulary, pick_windows
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    SPECTRUM,
    CheckpointSummary,
    read_checkpoint_summary,
    staged_directory,
)
from sliceserve.slicing.config import SlicedConfig, sliced_config
from sliceserve.slicing.corpora import Corpus, read_corpus
from sliceserve.slicing.dense import DenseModel, open_dense_model
from sliceserve.slicing.devices import checked_device
from sliceserve.slicing.errors import UserError, reason
from sliceserve.slicing.memory import TOKENS_PER_BATCH, peak_bytes, signal_budget
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.parts import PartWriter, assemble_shards, remove_shards
from sliceserve.slicing.progress import UNFINISHED, Progress
from sliceserve.slicing.rotations import RankRule, auto_rank, fixed_rank
from sliceserve.slicing.selftext import SELF, write_windows
from sliceserve.slicing.slicer import Slicer, signal_columns, sliced_width
from sliceserve.slicing.source import copy_tokenizer, load_tokenizer
from sliceserve.slicing.stopwatch import Stopwatch

METHOD = "SliceGPT (arXiv 2401.15024): sequential PCA"
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceOptions:
    """What to slice and how; the fields are the options of `sliceserve slice`.

    Attributes:
        fraction: of hidden_size to delete, in [0, 1).
        rotation: "dense" for whole matrices and a head of full width, as in the paper; "low-rank"
            for aligned bases, rotations of low rank and a sliced head.
        rank: of these; None takes what `rotations.auto_rank` says.
        calibration: the name of a text (see `corpora.read_corpus`), a file, or "self" for text
            that the dense model writes.
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
    rotation: str = "dense"
    rank: int | None = None
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
        peak_gpu_bytes: allocated on the GPU at most; 0 on a CPU.

    """

    summary: CheckpointSummary
    stopwatch: Stopwatch
    signals_home: str
    peak_bytes: int
    peak_gpu_bytes: int


def run_slice(options: SliceOptions, show_progress: bool = True) -> SliceRun:
    """Slice a model into `options.output`, which appears only when it is complete.

    Raises:
        UserError: anything the user gave that cannot be used; nothing is left behind.

    """
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already")
    device = checked_device(options.device)
    rank_rule = choose_rank_rule(options)
    corpus = None
    if options.calibration != SELF:
        corpus = read_corpus(options.calibration, "--calibration")
    model = open_dense_model(options.model)
    hidden_size = model.config.hidden_size
    width = sliced_width(hidden_size, options.fraction, options.round_to)
    tokenizer = load_tokenizer(model.location)
    check_positions(options, model)
    windows = None
    if corpus:
        windows = pick_windows(
            corpus,
            tokenizer,
            options.samples,
            options.sequence_length,
            options.seed,
            "--calibration",
        )
        check_vocabulary(windows, model.config.vocab_size)
    dtype = getattr(torch, options.dtype) if options.dtype else model.dtype
    places = model.architecture.places(model.config.num_hidden_layers)
    widths = [width] * (places - 1) + [width if rank_rule else hidden_size]

    def config_with(ranks: list[int | None]) -> SlicedConfig:
        return sliced_config(
            model.config,
            model.architecture,
            widths,
            ranks,
            model.parameters,
            str(dtype).removeprefix("torch."),
        )

    largest = config_with([None] * (places - 1))
    numbers = sum(torch.Size(shape).numel() for shape in expected_shapes(largest).values())
    forward_dtype = torch.float32 if device.type == "cpu" else model.dtype
    signal_bytes = signal_budget(model, options.memory_limit, device, dtype)
    job = describe_job(options, corpus, forward_dtype)
    files = {file.name: [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in model.files}
    tokens = options.samples * options.sequence_length
    if tokens < hidden_size:
        logger.warning(
            "%d calibration tokens span at most %d of the %d dimensions of the residual stream: "
            "use more --samples",
            tokens,
            tokens,
            hidden_size,
        )
    # The weights, and the signals three times: spilled, saved, and saved anew.
    columns = signal_columns(hidden_size, widths, rank_rule)
    room = numbers * dtype.itemsize + 3 * tokens * columns * forward_dtype.itemsize
    with (
        staged_directory(options.output, room, options.resume) as staging,
        ThreadPoolExecutor(1) as hasher,
    ):
        unfinished = staging / UNFINISHED
        job_of_files = job | {"source files": files}
        if not Progress(unfinished, job_of_files).part_bytes:
            remove_shards(staging)
        sha256 = hasher.submit(model.sha256)
        if windows is None:
            windows = write_windows(
                unfinished / "windows.safetensors",
                model,
                tokenizer,
                (options.samples, options.sequence_length),
                options.seed,
                device,
                show_progress,
            )

        def attempt(model: DenseModel, windows_per_batch: int) -> tuple[Slicer, Progress]:
            progress = Progress(unfinished, job_of_files)
            with PartWriter(unfinished, dtype) as writer:
                slicer = Slicer(
                    model,
                    widths,
                    rank_rule,
                    writer,
                    device,
                    forward_dtype,
                    signal_bytes,
                    windows_per_batch,
                )
                slicer.run(windows, progress, show_progress)
            return slicer, progress

        slicer, progress = _within_memory(attempt, model, options, device)
        with slicer.stopwatch("writing"):
            assemble_shards(progress.directory, staging, progress.part_bytes)
        config_with(slicer.ranks).save_pretrained(staging)
        copy_tokenizer(model.location, staging)
        copy_generation_config(model, staging)
        np.save(staging / SPECTRUM, slicer.spectrum.numpy().astype(np.float32))
        source = {
            "model": options.model,
            "files": list(files),
            "sha256": sha256.result(),
            "parameters": model.parameters,
            "bytes": sum(size for size, _ in files.values()),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        record = {"method": METHOD, "source": source, **job}
        record["calibration"]["tokens_sha256"] = hashlib.sha256(
            windows.numpy().tobytes()
        ).hexdigest()
        (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        read_checkpoint_summary(staging)
        shutil.rmtree(progress.directory)
    summary = read_checkpoint_summary(options.output)
    peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return SliceRun(summary, slicer.stopwatch, slicer.signals.home, peak_bytes(), peak_gpu)


def choose_rank_rule(options: SliceOptions) -> RankRule | None:
    """Return how ranks are chosen; None for whole matrices.

    Raises:
        UserError: a rank is given for whole matrices.

    """
    if options.rotation == "dense":
        if options.rank is not None:
            raise UserError(f"--rank {options.rank} needs --rotation low-rank")
        return None
    return auto_rank if options.rank is None else fixed_rank(options.rank)


def check_positions(options: SliceOptions, model: DenseModel) -> None:
    """Check that a window is no longer than the model's context.

    Raises:
        UserError: it is.

    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and options.sequence_length > limit:
        raise UserError(
            f"--sequence-length {options.sequence_length} is more than the {limit} positions "
            f"of MODEL {options.model!r}"
        )


def _within_memory(
    attempt: Callable[[DenseModel, int], T],
    model: DenseModel,
    options: SliceOptions,
    device: torch.device,
) -> T:
    """Run `attempt` with as many windows at once as the GPU has memory for.

    What a failed attempt has finished stays; the next one goes on from it.
    """
    windows_per_batch = max(1, TOKENS_PER_BATCH // options.sequence_length)
    while True:
        try:
            return attempt(model, windows_per_batch)
        except torch.OutOfMemoryError as error:
            if windows_per_batch == 1:
                raise UserError(
                    f"--device {str(device)!r} is too small for one window of "
                    f"--sequence-length {options.sequence_length}: {reason(error)}"
                ) from error
        logger.warning(
            "%s ran out of memory with %d windows of %d tokens at once: going on with %d",
            device,
            windows_per_batch,
            options.sequence_length,
            windows_per_batch // 2,
        )
        windows_per_batch //= 2
        # The modules of the model that has failed are taken apart.
        model = open_dense_model(options.model)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def copy_generation_config(model: DenseModel, staging: Path) -> None:
    """Copy the generation defaults (end-of-sequence ids, sampling), or derive them."""
    path = model.location.directory / "generation_config.json"
    if not model.location.gguf_file and path.is_file():
        (staging / path.name).write_bytes(path.read_bytes())
        return
    generation = transformers.GenerationConfig.from_model_config(model.config)
    generation.save_pretrained(staging)


def describe_job(
    options: SliceOptions, corpus: Corpus | None, forward_dtype: torch.dtype
) -> dict[str, Any]:
    """Return what determines the result beside the source, as plain JSON."""
    chosen = asdict(options)
    for name in ("output", "memory_limit", "resume"):
        del chosen[name]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("sliceserve", "torch", "transformers", "safetensors", "numpy")
    }
    return {
        "calibration": {"text": options.calibration, "sha256": corpus.sha256 if corpus else None},
        "options": chosen,
        "forward_dtype": str(forward_dtype).removeprefix("torch."),
        "versions": versions | {"python": platform.python_version()},
    }
