"""One slicing job: from a model's name to a finished checkpoint directory."""

import importlib.metadata
import json
import platform
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
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.slicer import Slicer, sliced_width
from sliceserve.slicing.source import copy_tokenizer, load_tokenizer
from sliceserve.slicing.weights import ShardWriter


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


def run_slice(options: SliceOptions, show_progress: bool = True) -> CheckpointSummary:
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
    with staged_directory(options.output, numbers * dtype.itemsize) as staging:
        writer = ShardWriter(staging, dtype)
        forward_dtype = torch.float32 if device.type == "cpu" else model.dtype
        with within_memory(device):
            Slicer(model, widths, writer, device, forward_dtype).run(windows, show_progress)
        writer.finish()
        config.save_pretrained(staging)
        copy_tokenizer(model.location, staging)
        copy_generation_config(model, staging)
        record = provenance(options, model, text, forward_dtype)
        (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        read_checkpoint_summary(staging)
    return read_checkpoint_summary(options.output)


def copy_generation_config(model: DenseModel, staging: Path) -> None:
    """Copy the generation defaults (end-of-sequence ids, sampling), or derive them."""
    path = model.location.directory / "generation_config.json"
    if not model.location.gguf_file and path.is_file():
        (staging / path.name).write_bytes(path.read_bytes())
        return
    generation = transformers.GenerationConfig.from_model_config(model.config)
    generation.save_pretrained(staging)


def provenance(
    options: SliceOptions, model: DenseModel, text: Text, forward_dtype: torch.dtype
) -> dict[str, Any]:
    """Return what one needs to make the same checkpoint again."""
    chosen = asdict(options) | {"output": options.output.name}
    versions = {
        name: importlib.metadata.version(name)
        for name in ("sliceserve", "torch", "transformers", "safetensors", "numpy")
    }
    return {
        "method": "SliceGPT (arXiv 2401.15024): sequential PCA, dense rotations, full-width head",
        "source": {
            "model": options.model,
            "files": [file.name for file in model.files],
            "sha256": model.sha256(),
            "parameters": model.parameters,
        },
        "calibration": {"text": text.name, "sha256": text.sha256},
        "options": chosen,
        "forward_dtype": str(forward_dtype).removeprefix("torch."),
        "versions": versions | {"python": platform.python_version()},
    }
