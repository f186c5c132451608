"""Write config.json of a dense model's shape and of the same sliced, for runs with dummy weights.

python benchmarks/make_shape.py llama-2-7b OUT --fraction 0.25
python benchmarks/throughput.py OUT/dense OUT/sliced --load-format dummy --requests 1 64
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.slicer import sliced_width

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "kv_heads": 32},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "kv_heads": 40},
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "kv_heads": 8},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--round-to", type=int, default=128)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    hidden_size, layers = shape["hidden_size"], shape["layers"]
    dense = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    matrices = 2 * hidden_size * (hidden_size + shape["kv_heads"] * 128)
    layer = matrices + 3 * hidden_size * shape["intermediate_size"] + 2 * hidden_size
    parameters = layers * layer + hidden_size + 2 * dense.vocab_size * hidden_size
    width = sliced_width(hidden_size, options.fraction, options.round_to)
    sliced = sliced_config(
        dense,
        find_architecture("LlamaForCausalLM"),
        [width] * (2 * layers) + [hidden_size],
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
