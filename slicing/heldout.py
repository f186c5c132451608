"""Perplexity of a model before and after slicing, on text of the calibration's kinds left over.

One number on one kind of text flatters a model that has forgotten the others (README, "Slice a
model"); so every slicing ends with one for each kind.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import Architecture
from sliceserve.slicing.checkpoint import read_sliced_config
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.errors import reading
from sliceserve.slicing.memory import ROWS_OF_LOGITS, TOKENS_PER_BATCH
from sliceserve.slicing.modeling import HEAD_MAP
from sliceserve.slicing.source import Location, locate

HELD_OUT_WINDOWS = 2  # of each kind


def measure_held_out(
    dense: DenseModel,
    sliced: Path,
    windows: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    show_progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measure a dense and its sliced model; layers are read from the disk, one after the other.

    Args:
        dense: the dense model.
        sliced: the directory of the sliced one.
        windows: token ids by kind of text, [count, sequence_length].
        device: where to run.
        dtype: to run in.
        show_progress: whether to show bars.

    Returns:
        By kind: "windows", and the perplexities "dense" and "sliced".

    """
    if not windows:
        return {}
    found: dict[str, dict[str, Any]] = {
        kind: {"windows": len(rows)} for kind, rows in windows.items()
    }
    rows = torch.cat(list(windows.values()))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(read_sliced_config(sliced))
    for name, location, modules in (
        ("dense", dense.location, dense.skeleton),
        ("sliced", locate(str(sliced)), skeleton),
    ):
        model = _open_model(location, modules, dense.architecture, device, dtype)
        with tqdm(
            total=len(rows), desc=f"held out, {name}", unit="window", disable=not show_progress
        ) as bar:
            nats = negative_log_likelihoods(model, dense.architecture, rows, bar)
        parts = torch.split(nats, [len(part) for part in windows.values()])
        for kind, part in zip(windows, parts, strict=True):
            found[kind][name] = math.exp(min(part.mean().item(), 700))
    return found


def _open_model(
    location: Location,
    skeleton: nn.Module,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Load a model whose decoder layers stay on the disk; those of a GGUF file cannot."""
    place: dict[str, Any] = {}
    if not location.gguf_file:
        place["device_map"] = _placement(skeleton, architecture.layers, str(device))
    with reading(f"MODEL {location}"):
        model = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=dtype, **place
        )
    return model.eval() if place else model.to(device).eval()


def _placement(module: nn.Module, layers: str, device: str, path: str = "") -> dict[str, str]:
    """Return a device map: the decoder layers on the disk, all else on the device."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        own = f"{path}.{name}".lstrip(".")
        if layers.startswith(f"{own}."):
            found |= _placement(child, layers, device, own)
        else:
            found[own] = "disk" if own == layers else device
    return found


@torch.inference_mode()
def negative_log_likelihoods(
    model: Any, architecture: Architecture, windows: Tensor, bar: Any
) -> Tensor:
    """Return each window's mean negative log-likelihood (nats) a predicted token, [windows].

    Every token but the first of a window is predicted; windows do not see each other.
    """
    at_once = max(1, 2 * TOKENS_PER_BATCH // windows.shape[1])
    body, head = model.get_submodule(model.base_model_prefix), model.get_output_embeddings()
    before = getattr(model, HEAD_MAP, None)
    device = model.get_submodule(architecture.tokens).weight.device
    means = []
    for batch in torch.split(windows, at_once):
        ids = batch.to(device)
        streams = body(input_ids=ids, use_cache=False).last_hidden_state
        for stream, tokens in zip(streams, ids, strict=True):
            total = 0.0
            for start in range(0, len(tokens) - 1, ROWS_OF_LOGITS):
                targets = tokens[start + 1 : start + 1 + ROWS_OF_LOGITS]
                part = stream[start : start + len(targets)]
                logits = head(part if before is None else before(part)).float()
                total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            means.append(total / (len(tokens) - 1))
        bar.update(len(ids))
    return torch.tensor(means, dtype=torch.float64)


def describe_held_out(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the perplexities as a table, the mean of their ratios last."""
    width = max([len("held out"), *map(len, found)])
    lines = [f"{'held out':<{width}} {'dense':>9} {'sliced':>9} {'ratio':>6}"]
    ratios = []
    for kind, values in found.items():
        ratios.append(values["sliced"] / values["dense"])
        lines.append(
            f"{kind:<{width}} {values['dense']:>9.2f} {values['sliced']:>9.2f} {ratios[-1]:>6.2f}"
        )
    if len(ratios) > 1:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"{'mean':<{width}} {'':>9} {'':>9} {mean:>6.2f}")
    return "\n".join(lines)
