"""Perplexity of a dense or sliced model on a text, through Transformers."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import architecture_of
from sliceserve.slicing.calibration import read_text, token_windows
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.job import checked_device
from sliceserve.slicing.source import (
    Location,
    load_tokenizer,
    locate,
    open_dense_model,
    read_dense_config,
)


@dataclass(frozen=True)
class Perplexity:
    """The result: exp of the mean negative log-likelihood (nats) over predicted tokens."""

    perplexity: float
    predicted_tokens: int
    windows: int
    sequence_length: int


def measure_text(
    model: str,
    text: str,
    sequence_length: int,
    samples: int | None,
    device: str,
    dtype: str | None,
) -> Perplexity:
    """Measure a model, by name, on the first windows of a text file.

    Args:
        model: a dense model (directory, hub id, .gguf file) or a sliced checkpoint.
        text: a UTF-8 file.
        sequence_length: tokens in a window.
        samples: windows; None takes all.
        device: where it runs.
        dtype: to run in; None is float32 on a CPU and the stored one elsewhere.

    Raises:
        UserError: no such model, text or device, or a text too short.

    """
    content = read_text(text, "--text")
    place = checked_device(device)
    location = locate(model)
    windows = token_windows(content, load_tokenizer(location), sequence_length)
    if len(windows) < (samples or 1):
        raise UserError(
            f"--text {text!r} is too short for --samples {samples or 1} of "
            f"--sequence-length {sequence_length}: {len(windows)} fit"
        )
    if dtype is None and place.type == "cpu":
        dtype = "float32"
    loaded = load_model(location, place, getattr(torch, dtype) if dtype else None)
    return measure(loaded, windows[:samples])


def load_model(location: Location, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Load a dense or sliced model, its tensors checked first: Transformers fills gaps silently.

    Args:
        location: from `locate`.
        device: where it runs.
        dtype: to run in; None takes the stored one.

    Raises:
        UserError: not a model, or one that is corrupt.

    """
    config = location.directory / "config.json"
    if location.gguf_file:
        architecture_of(read_dense_config(location))
    elif config.is_file() and json.loads(config.read_text()).get("model_type") == MODEL_TYPE:
        read_checkpoint_summary(location.directory)
    else:
        open_dense_model(str(location.directory))
    model = AutoModelForCausalLM.from_pretrained(
        **location.from_pretrained_arguments(), dtype=dtype or "auto"
    )
    return model.to(device).eval()


@torch.inference_mode()
def measure(model: Any, windows: Tensor, show_progress: bool = True) -> Perplexity:
    """Measure a model on windows of tokens [windows, sequence_length].

    Within a window every token but the first is predicted; windows do not see each other.

    Raises:
        UserError: the model gives values that are not finite.

    """
    count, length = windows.shape
    total = 0.0
    with tqdm(windows, desc="perplexity", unit="window", disable=not show_progress) as bar:
        for done, window in enumerate(bar, start=1):
            ids = window.unsqueeze(0).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total += loss.item()
            bar.set_postfix(perplexity=f"{math.exp(total / (done * (length - 1))):.2f}")
    if not math.isfinite(total):
        raise UserError("MODEL_OR_DIR gives logits that are not finite: its weights are corrupt")
    predicted = count * (length - 1)
    return Perplexity(math.exp(total / predicted), predicted, count, length)
