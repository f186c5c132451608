"""Write a checkpoint of a well-known shape with random weights, shard by shard.

    python benchmarks/make_random.py llama-2-7b OUT --device cuda
    sliceserve slice OUT --output OUT-sliced --samples 128 --round-to 128

The second command prints its breakdown. The text is cut into bytes: no vocabulary is needed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from shapes import SHAPES, byte_tokenizer, dense_config
from transformers import AutoModelForCausalLM

from sliceserve.slicing.weights import INDEX


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--device", default="cpu", help="to draw the numbers on")
    options = parser.parse_args()
    config = dense_config(options.shape, options.layers)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        part = f"{int(parts[2]):05d}" if parts[1] == "layers" else parts[-2]
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    options.output.mkdir(parents=True)
    generator = torch.Generator(options.device).manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for file, names in shards.items():
        tensors = {}
        for name in names:
            noise = torch.empty(shapes[name], device=options.device)
            noise.normal_(generator=generator)
            value = 1 + 0.1 * noise if "norm" in name else 0.02 * noise
            tensors[name] = value.to(torch.bfloat16).cpu()
        save_file(tensors, options.output / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (options.output / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(options.output)
    byte_tokenizer().save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
