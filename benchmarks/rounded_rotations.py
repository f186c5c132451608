"""What it costs to quantise the rotations of sliced models too, linears left as they are.

    python benchmarks/rounded_rotations.py DIR DIR --text FILE

Eight bits have a scale a row, and what a rotation reads is rounded a token; four have a scale for
64 inputs (or a row, where 64 do not divide them). All are rounded to nearest.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sliceserve.slicing.calibration import token_windows
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.modeling import ROTATION
from sliceserve.slicing.perplexity import load_model, measure
from sliceserve.slicing.source import load_tokenizer, locate, quiet_transformers

GROUP_SIZE = 64


def scaled(x: Tensor, largest: float) -> Tensor:
    """The step of each row whose largest value is to lie at `largest` steps."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest


def fp8(x: Tensor) -> Tensor:
    step = scaled(x, torch.finfo(torch.float8_e4m3fn).max)
    return (x / step).to(torch.float8_e4m3fn).to(x.dtype) * step


def int8(x: Tensor) -> Tensor:
    step = scaled(x, 127)
    return (x / step).round() * step


def int4(x: Tensor) -> Tensor:
    size = GROUP_SIZE if x.shape[-1] % GROUP_SIZE == 0 else x.shape[-1]
    groups = x.reshape(len(x), -1, size)
    step = scaled(groups, 7.5)
    return ((groups / step).round().clamp(-8, 7) * step).reshape(x.shape)


def reading(rounded: Callable[[Tensor], Tensor]) -> Any:
    return lambda _module, inputs: (rounded(inputs[0]),)


def round_rotations(model: nn.Module, name: str) -> None:
    rounded = {"fp8": fp8, "int8": int8, "4 bits": int4}[name]
    for path, module in model.named_modules():
        if f".{ROTATION}." in path and isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data)
            if name != "4 bits":
                module.register_forward_pre_hook(reading(rounded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=1024)
    options = parser.parse_args()
    quiet_transformers()
    print("| rotations | kept | fp8 | int8 | 4 bits |", flush=True)
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for directory in options.directories:
        location = locate(directory)
        windows = token_windows(
            read_corpus(options.text, "--text"), load_tokenizer(location), options.sequence_length
        )[: options.samples]
        cells = []
        for name in ("kept", "fp8", "int8", "4 bits"):
            model = load_model(location, torch.device("cpu"), torch.float32)
            if name != "kept":
                round_rotations(model, name)
            nats = measure(model, windows, show_progress=False)
            cells.append(f"{math.exp(nats / (windows.numel() - len(windows))):.2f}")
        print(f"| {directory} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
