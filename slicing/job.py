"""One slicing job: from a model's name to a finished checkpoint directory."""

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from sliceserve.slicing.calibration import check_vocabulary, pick_calibration
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    SPECTRUM,
    CheckpointSummary,
    read_checkpoint_summary,
    staged_directory,
)
from sliceserve.slicing.corpora import MIXTURE, Corpus, read_corpus
from sliceserve.slicing.dense import DenseModel, open_dense_model
from sliceserve.slicing.devices import checked_device, layers_dtype, within_memory
from sliceserve.slicing.errors import MachineError, UserError, reason
from sliceserve.slicing.heldout import HELD_OUT_WINDOWS, measure_held_out
from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.memory import TOKENS_PER_BATCH, peak_bytes, signal_budget
from sliceserve.slicing.parts import PartWriter, assemble_shards, remove_shards
from sliceserve.slicing.progress import UNFINISHED, Progress, note_job, remove_other
from sliceserve.slicing.selftext import SELF, write_windows
from sliceserve.slicing.shape import choose_shape
from sliceserve.slicing.slicer import Slicer
from sliceserve.slicing.source import copy_tokenizer, load_tokenizer
from sliceserve.slicing.stopwatch import Stopwatch
from sliceserve.slicing.survey import GRADIENT_WINDOWS, Survey

METHOD = "SliceGPT (arXiv 2401.15024)"
PAPER: dict[str, Any] = {
    "rotation": "dense",
    "basis": "pca",
    "refit": "none",
}  # the options of its own form
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceOptions:
    """What to slice and how; the fields are the options of `sliceserve slice`.

    Attributes:
        model: a Hugging Face directory, a hub id or a .gguf file.
        output: the directory to make.
        revision: of a model on the hub, a commit, tag or branch; None takes its main branch.
        target_params: parameters to keep, rotations and head included, as a share of the model's
            as it is stored; picks the width, and the form unless given. None takes the fraction.
        fraction: of hidden_size to delete, in [0, 1); None takes `shape.FRACTION`.
        rotation: "dense" for whole matrices and a head of full width, as in the paper; "low-rank"
            for aligned bases and rotations of low rank; "shared" for one basis and no rotations;
            None takes what `shape.choose_shape` says.
        rank: of low-rank rotations; "auto" takes what `rotations.auto_rank` says, None
            `rotations.default_rank`.
        basis: "pca" of the residual stream, or "output-aware", which looks at gradients as well.
        refit: "none"; "output" for linears that write the stream, and the head; "full" for those
            that read it too. A regression that is no better on held-out windows changes nothing.
        calibration: the name of a text (see `corpora.read_corpus`), a file, or "self" for text
            that the dense model writes.
        samples: calibration windows.
        sequence_length: tokens in a window.
        round_to: the width kept is a multiple of this; None takes `shape.default_multiple`.
        dtype: of the stored weights; None keeps the source's (bfloat16 for a GGUF file).
        compute_dtype: that layers run in; None takes what `devices.layers_dtype` says.
        memory_limit: bytes of host memory; None takes most of what is available.
        resume: keep what is unfinished when the run ends early, and go on from it.
        restart: resume, but begin anew what was begun with other inputs.

    """

    model: str
    output: Path
    revision: str | None = None
    target_params: float | None = None
    fraction: float | None = None
    rotation: str | None = None
    rank: int | str | None = None
    basis: str = "output-aware"
    refit: str = "full"
    calibration: str = MIXTURE
    samples: int = 64
    sequence_length: int = 2048
    round_to: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    compute_dtype: str | None = None
    memory_limit: int | None = None
    resume: bool = False
    restart: bool = False

    @property
    def surveys(self) -> bool:
        """Whether bases come from a survey of the dense model; the paper's come as it is sliced."""
        return any(getattr(self, name) != value for name, value in PAPER.items())


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
        MachineError: the hub, the disk or the memory failed.

    """
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already")
    device = checked_device(options.device)
    check_options(options)
    corpus = None
    if options.calibration != SELF:
        corpus = read_corpus(options.calibration, "--calibration")
    model = open_dense_model(options.model, options.revision)
    hidden_size = model.config.hidden_size
    tokenizer = load_tokenizer(model.location)
    check_positions(options, model)
    windows, held_out = None, {}
    if corpus:
        picked = pick_calibration(
            corpus,
            tokenizer,
            options.samples,
            options.sequence_length,
            options.seed,
            "--calibration",
            HELD_OUT_WINDOWS,
        )
        windows, held_out = picked.windows, picked.held_out
        check_vocabulary(windows, model.config.vocab_size)
    dtype = getattr(torch, options.dtype) if options.dtype else model.dtype
    shape = choose_shape(options, model, dtype)
    options = replace(options, rotation=shape.rotation)
    forward_dtype = layers_dtype(device, model.dtype)
    if options.compute_dtype:
        forward_dtype = getattr(torch, options.compute_dtype)
    signal_bytes = signal_budget(
        model,
        options.memory_limit,
        device,
        dtype,
        options.surveys,
        options.refit != "none",
    )
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
    room = shape.parameters * dtype.itemsize
    room += kept_on_disk(options, model, tokens, forward_dtype)
    with (
        staged_directory(options.output, room, options.resume or options.restart) as staging,
        ThreadPoolExecutor(1) as hasher,
    ):
        unfinished = staging / UNFINISHED
        job_of_files = job | {"source files": files, "source commit": model.location.commit}
        if options.restart:
            remove_other(unfinished, job_of_files)
        note_job(unfinished, job_of_files)
        if not Progress(unfinished, job_of_files).part_bytes:
            remove_shards(staging)
        sha256 = hasher.submit(model.sha256)
        if windows is None:
            written = write_windows(
                unfinished / "windows.safetensors",
                model,
                tokenizer,
                (options.samples + HELD_OUT_WINDOWS, options.sequence_length),
                options.seed,
                device,
                show_progress,
            )
            windows, held_out = written[: options.samples], {SELF: written[options.samples :]}

        def attempt(model: DenseModel, windows_per_batch: int) -> tuple[Slicer, Progress]:
            stopwatch = Stopwatch(device)
            layers = DenseLayers(model, device, forward_dtype)
            survey = None
            if options.surveys:
                directory = unfinished / "survey"
                survey_progress = Progress(directory, job_of_files)
                survey = Survey(layers, shape.survey_plan(options), survey_progress, stopwatch)
                survey.run(windows, windows_per_batch, signal_bytes, show_progress)
            progress = Progress(unfinished, job_of_files)
            with PartWriter(unfinished, dtype) as writer:
                slicer = Slicer(layers, shape.slice_plan(options), survey, writer, stopwatch)
                slicer.run(windows, windows_per_batch, signal_bytes, progress, show_progress)
            return slicer, progress

        slicer, progress = _within_memory(attempt, model, options, device)
        with slicer.stopwatch("writing"):
            assemble_shards(progress.directory, staging, progress.part_bytes)
        shape.config(slicer.places.ranks).save_pretrained(staging)
        copy_tokenizer(model.location, staging)
        copy_generation_config(model, staging)
        np.save(staging / SPECTRUM, slicer.places.spectrum.numpy().astype(np.float32))
        source = {
            "model": options.model,
            "revision": options.revision,
            "commit": model.location.commit,
            "files": list(files),
            "sha256": sha256.result(),
            "parameters": model.parameters,
            "bytes": sum(size for size, _ in files.values()),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        record = {"method": METHOD, "source": source, **job}
        record["refit"] = describe_refit(slicer.strengths)
        record["calibration"]["tokens_sha256"] = hashlib.sha256(
            windows.numpy().tobytes()
        ).hexdigest()
        with slicer.stopwatch("measuring"), within_memory(device):
            record["held_out"] = measure_held_out(
                model, staging, held_out, device, forward_dtype, show_progress
            )
        (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        read_checkpoint_summary(staging)
        shutil.rmtree(progress.directory)
    summary = read_checkpoint_summary(options.output)
    peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return SliceRun(summary, slicer.stopwatch, slicer.signals.home, peak_bytes(), peak_gpu)


def check_options(options: SliceOptions) -> None:
    """Check that the options go together.

    Raises:
        UserError: they do not.

    """
    if options.target_params is not None and options.fraction is not None:
        raise UserError("--target-params and --fraction both say how much to keep: give one")
    if options.rank is not None and options.rotation not in (None, "low-rank"):
        raise UserError(f"--rank {options.rank} needs --rotation low-rank")
    if options.rank == "auto" and options.target_params is not None:
        raise UserError("--target-params needs a number as --rank, not 'auto'")
    if options.refit != "none" and options.samples < 2:
        raise UserError(f"--samples {options.samples} leaves none to fit on beside the held out")


def describe_refit(strengths: Sequence[float]) -> dict[str, int]:
    """Count the regressions of a run, and those whose weights stayed as they were; say so."""
    rejected = strengths.count(math.inf)
    if rejected:
        logger.warning(
            "--refit left the weights of %d of %d regressions as they were: no fit was better on "
            "held-out windows",
            rejected,
            len(strengths),
        )
    return {"regressions": len(strengths), "rejected": rejected}


def kept_on_disk(
    options: SliceOptions, model: DenseModel, tokens: int, forward_dtype: torch.dtype
) -> int:
    """Estimate the bytes on disk beside the weights: signals, what a survey finds and its tape."""
    hidden_size = int(model.config.hidden_size)
    signal = tokens * hidden_size * forward_dtype.itemsize
    streams = 1 if options.refit == "none" else 2
    # Spilled, saved, and saved anew.
    needed = 3 * streams * signal
    if options.surveys:
        places = model.architecture.places(model.config.num_hidden_layers)
        needed += 2 * places * hidden_size**2 * 8
        share = min(1.0, GRADIENT_WINDOWS / options.samples)
        needed += int(share * signal * model.config.num_hidden_layers)
    return needed


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
                raise MachineError(
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
    for name in ("output", "memory_limit", "resume", "restart"):
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
