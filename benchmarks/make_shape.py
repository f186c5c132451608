"""Write config.json of a dense model's shape and of the same sliced, for runs with dummy weights.

python benchmarks/make_shape.py llama-2-7b OUT --fraction 0.25
python benchmarks/throughput.py OUT/dense OUT/sliced --load-format dummy --requests 1 64
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from shapes import SHAPES, dense_config
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.shape import sliced_width


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--round-to", type=int, default=128)
    options = parser.parse_args()
    dense = dense_config(options.shape)
    hidden_size, layers = dense.hidden_size, dense.num_hidden_layers
    with init_empty_weights():
        parameters = AutoModelForCausalLM.from_config(dense).num_parameters()
    width = sliced_width(hidden_size, options.fraction, options.round_to)
    sliced = sliced_config(
        dense,
        find_architecture("LlamaForCausalLM"),
        [width] * (2 * layers) + [hidden_size],
        [None] * (2 * layers),
        parameters,
        "bfloat16",
    )
    dense.save_pretrained(options.output / "dense")
    sliced.save_pretrained(options.output / "sliced")
    stored = sum(torch.Size(shape).numel() for shape in expected_shapes(sliced).values())
    print(f"dense  {parameters:,} parameters, width {hidden_size}")
    print(f"sliced {stored:,} parameters ({stored / parameters:.1%}), width {width}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
