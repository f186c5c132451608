"""What the precision of the moments costs: float64, float32 products summed in float64, float32.

    python benchmarks/moments.py MODEL --calibration FILE --text FILE

Slices MODEL three times by 25 % on the CPU, all else equal.
"""

import argparse
import math
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from sliceserve.slicing.calibration import token_windows
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.moments import SecondMoment
from sliceserve.slicing.perplexity import load_model, measure
from sliceserve.slicing.source import load_tokenizer, locate, quiet_transformers


class ExactMoment(SecondMoment):
    """Products and sum in float64."""

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self._lower.addmm_(rows.T, rows)


class SingleMoment(SecondMoment):
    """Product and sum in float32; only the eigenvectors are float64."""

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self._lower.copy_(self._lower.float().addmm_(rows.T, rows))


MOMENTS = {"float64": ExactMoment, "float32 products": SecondMoment, "float32": SingleMoment}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    options = parser.parse_args()
    quiet_transformers()
    length = options.sequence_length
    tokenizer = load_tokenizer(locate(options.model))
    held_out = token_windows(read_corpus(options.text, "--text"), tokenizer, length)[:8]
    print("| moments | seconds | of these moments | perplexity |", flush=True)
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name, kind in MOMENTS.items():
        with (
            tempfile.TemporaryDirectory() as work,
            patch("sliceserve.slicing.slicer.SecondMoment", kind),
        ):
            run = run_slice(
                SliceOptions(
                    options.model,
                    Path(work, "sliced"),
                    calibration=options.calibration,
                    samples=options.samples,
                    sequence_length=length,
                    dtype="float32",
                    **PAPER,
                )
            )
            model = load_model(
                locate(str(Path(work, "sliced"))), torch.device("cpu"), torch.float32
            )
            value = math.exp(measure(model, held_out) / (held_out.numel() - len(held_out)))
        seconds = run.stopwatch.seconds
        print(
            f"| {name} | {sum(seconds.values()):.1f} | {seconds['moments']:.1f} | {value:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
