"""Perplexity of a dense or sliced model on a text, through Transformers or vLLM."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sliceserve.slicing.calibration import check_vocabulary, token_windows
from sliceserve.slicing.checkpoint import read_checkpoint_summary, read_sliced_config
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.dense import open_dense_model, read_dense_config
from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import UserError, reading
from sliceserve.slicing.source import Location, load_tokenizer, locate, read_json_object


@dataclass(frozen=True)
class Perplexity:
    """The result: exp of the mean negative log-likelihood (nats) over predicted tokens.

    Within a window every token but the first is predicted; windows do not see each other.
    """

    model: str
    text: str
    backend: str
    perplexity: float
    predicted_tokens: int
    windows: int
    sequence_length: int


def measure_text(
    model: str,
    text: str,
    sequence_length: int = 2048,
    samples: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    backend: str = "transformers",
    show_progress: bool = True,
    revision: str | None = None,
) -> Perplexity:
    """Measure a model, by name, on the first windows of a text.

    Args:
        model: a dense model (directory, hub id, .gguf file) or a sliced checkpoint.
        text: a text (see `corpora.read_corpus`); of a data set the held-out part.
        sequence_length: tokens in a window.
        samples: windows; None takes all.
        device: where it runs.
        dtype: to run in; None is float32 on a CPU and the stored one elsewhere.
        backend: "transformers" or "vllm".
        show_progress: whether to draw a bar; vLLM draws its own.
        revision: of a model on the hub.

    Raises:
        UserError: no such model, text or device, a text too short, tokens that the model lacks, or
            values that are not finite.
        MachineError: the hub did not give model or text, or the device is too small.

    """
    corpus = read_corpus(text, "--text", "held out")
    place = checked_device(device)
    location = locate(model, revision=revision)
    windows = token_windows(corpus, load_tokenizer(location), sequence_length)
    if len(windows) < (samples or 1):
        raise UserError(
            f"--text {text!r} is too short for --samples {samples or 1} of "
            f"--sequence-length {sequence_length}: {len(windows)} fit"
        )
    windows = windows[:samples]
    config = check_model(location)
    check_vocabulary(windows, config.vocab_size)
    chosen = default_dtype(place, dtype)
    if backend == "vllm":
        from sliceserve.server.scoring import negative_log_likelihood

        if location.gguf_file:
            raise UserError(f"--backend 'vllm' does not read the GGUF file {location}")
        total = negative_log_likelihood(location.directory, windows, chosen)
    else:
        with within_memory(place):
            total = measure(load_model(location, place, chosen), windows, show_progress)
    predicted = windows.numel() - len(windows)
    perplexity = _exp(total / predicted)
    if not math.isfinite(perplexity):
        raise UserError(f"MODEL_OR_DIR {location} gives logits that are not finite")
    return Perplexity(model, text, backend, perplexity, predicted, *windows.shape)


def default_dtype(device: torch.device, dtype: str | None) -> torch.dtype | None:
    """Return the dtype to run in by its name: without one, float32 on a CPU, else the stored."""
    if dtype is None and device.type == "cpu":
        return torch.float32
    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    return chosen


def check_model(location: Location) -> Any:
    """Check a dense or sliced model's tensors and return its config.

    Raises:
        UserError: not a model, or one that is corrupt.

    """
    config = location.directory / "config.json"
    if location.gguf_file:
        return read_dense_config(location)
    if config.is_file() and read_json_object(config).get("model_type") == MODEL_TYPE:
        read_checkpoint_summary(location.directory)
        return read_sliced_config(location.directory)
    return open_dense_model(str(location.directory)).config


def load_model(location: Location, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Load a model that has been checked: Transformers itself fills gaps silently.

    Args:
        location: of a dense or sliced model.
        device: where it runs.
        dtype: to run in; None takes the stored one.

    Raises:
        UserError: it cannot be read.

    """
    with reading(f"MODEL_OR_DIR {location}"):
        model = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=dtype or "auto"
        )
    return model.to(device).eval()


@torch.inference_mode()
def measure(model: Any, windows: Tensor, show_progress: bool = True) -> float:
    """Return a model's summed negative log-likelihood (nats) of windows [count, sequence_length].

    Every token but the first of a window is predicted; windows do not see each other.
    """
    length = windows.shape[1]
    total = 0.0
    with tqdm(windows, desc="perplexity", unit="window", disable=not show_progress) as bar:
        for done, window in enumerate(bar, start=1):
            ids = window.unsqueeze(0).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total += loss.item()
            bar.set_postfix(perplexity=f"{_exp(total / (done * (length - 1))):.2f}")
    return total


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
