"""Perplexity of a dense or sliced model on a text, through Transformers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sliceserve.slicing.calibration import check_vocabulary, token_windows
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.dense import open_dense_model, read_dense_config
from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import UserError, reading
from sliceserve.slicing.source import Location, load_tokenizer, locate, read_json_object


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
    corpus = read_corpus(text, "--text", "held out")
    place = checked_device(device)
    location = locate(model)
    windows = token_windows(corpus, load_tokenizer(location), sequence_length)
    if len(windows) < (samples or 1):
        raise UserError(
            f"--text {text!r} is too short for --samples {samples or 1} of "
            f"--sequence-length {sequence_length}: {len(windows)} fit"
        )
    with within_memory(place):
        loaded = load_model(location, place, default_dtype(place, dtype))
        return measure(loaded, windows[:samples])


def default_dtype(device: torch.device, dtype: str | None) -> torch.dtype | None:
    """Return the dtype to run in by its name: without one, float32 on a CPU, else the stored."""
    if dtype is None and device.type == "cpu":
        return torch.float32
    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    return chosen


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
        read_dense_config(location)
    elif config.is_file() and read_json_object(config).get("model_type") == MODEL_TYPE:
        read_checkpoint_summary(location.directory)
    else:
        open_dense_model(str(location.directory))
    with reading(f"MODEL_OR_DIR {location}"):
        model = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=dtype or "auto"
        )
    return model.to(device).eval()


@torch.inference_mode()
def measure(model: Any, windows: Tensor, show_progress: bool = True) -> Perplexity:
    """Measure a model on windows of tokens [windows, sequence_length].

    Within a window every token but the first is predicted; windows do not see each other.

    Raises:
        UserError: the model gives values that are not finite, or lacks some of the tokens.

    """
    check_vocabulary(windows, model.config.vocab_size)
    count, length = windows.shape
    total = 0.0
    with tqdm(windows, desc="perplexity", unit="window", disable=not show_progress) as bar:
        for done, window in enumerate(bar, start=1):
            ids = window.unsqueeze(0).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total += loss.item()
            bar.set_postfix(perplexity=f"{_exp(total / (done * (length - 1))):.2f}")
    predicted = count * (length - 1)
    perplexity = _exp(total / predicted)
    if not math.isfinite(perplexity):
        raise UserError("MODEL_OR_DIR gives logits that are not finite: its weights are corrupt")
    return Perplexity(perplexity, predicted, count, length)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
