"""Perplexity against true parameters: the paper's form, each step beyond it, and all together.

    python benchmarks/frontier.py MODEL --calibration FILE --text FILE --targets 0.9 0.8

Slices MODEL in every form to every target (rotations and head included, against the model as it is
stored) and measures the result on the start of each text. MODEL, FILE and --device are as for
`sliceserve slice`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.perplexity import measure_text
from sliceserve.slicing.source import quiet_transformers

AWARE = {"basis": "output-aware", "refit": "none"}
FORMS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "output-aware bases": {"rotation": "dense", **AWARE},
    "and low-rank rotations": {"rotation": "low-rank", **AWARE},
    "and refit (default)": {},
    "shared basis, full refit": {"rotation": "shared", "refit": "full"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=64, help="of each text, to measure on")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet_transformers()

    def measured(model: str) -> list[float]:
        length, windows, device = options.sequence_length, options.windows, options.device
        return [
            measure_text(model, text, length, windows, device, "float32").perplexity
            for text in options.text
        ]

    names = [Path(text).stem for text in options.text]
    print(f"| form | width | parameters | of the stored | {' | '.join(names)} | seconds |")
    print(f"| --- | ---: | ---: | ---: | {'---: | ' * len(names)}---: |")
    values = " | ".join(f"{value:.2f}" for value in measured(options.model))
    print(f"| dense | | | 1.000 | {values} | |", flush=True)
    for form in options.forms:
        for target in options.targets:
            with tempfile.TemporaryDirectory() as work:
                output = Path(work, "sliced")
                started = time.perf_counter()
                chosen = SliceOptions(
                    options.model,
                    output,
                    target_params=target,
                    calibration=options.calibration,
                    samples=options.samples,
                    sequence_length=options.sequence_length,
                    device=options.device,
                    dtype="float32",
                    **FORMS[form],
                )
                summary = run_slice(chosen, show_progress=False).summary
                seconds = time.perf_counter() - started
                found = measured(str(output))
            values = " | ".join(f"{value:.2f}" for value in found)
            print(
                f"| {form} | {summary.slicing.widths[0]} | {summary.sliced_parameters:,} | "
                f"{summary.ratio:.3f} | {values} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
