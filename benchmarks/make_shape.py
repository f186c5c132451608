"""Write config.json of a dense model's shape and of the same sliced, for runs with dummy weights.

python benchmarks/make_shape.py llama-2-7b OUT --fraction 0.25 --rotation low-rank
sliceserve benchmark OUT/low-rank-0.25 --against OUT/dense --load-format dummy
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from shapes import SHAPES, dense_config
from transformers import AutoConfig, AutoModelForCausalLM

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import sliced_config
from sliceserve.slicing.finetune import adapted_linears
from sliceserve.slicing.modeling import SlicedConfig, expected_shapes
from sliceserve.slicing.rotations import default_rank
from sliceserve.slicing.shape import sliced_width

ROTATIONS = ("dense", "low-rank", "shared")


def write_dense_shape(shape: str, directory: Path) -> int:
    """Write the config of a shape; return its parameters."""
    config = dense_config(shape)
    config.save_pretrained(directory)
    return dense_parameters(shape)


def dense_parameters(shape: str) -> int:
    """Count the parameters of a shape."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(dense_config(shape))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def write_sliced_shape(
    shape: str, directory: Path, fraction: float, rotation: str, round_to: int, rank: int | None
) -> int:
    """Write the config of a sliced shape; return its parameters, rotations and head included."""
    dense = dense_config(shape)
    width = sliced_width(dense.hidden_size, fraction, round_to)
    architecture = find_architecture(dense.architectures[0])
    places = len(architecture.sublayers) * dense.num_hidden_layers
    turned = {"dense": None, "low-rank": rank or default_rank(dense.hidden_size), "shared": 0}
    last = dense.hidden_size if rotation == "dense" else width
    config = sliced_config(
        dense,
        architecture,
        [width] * places + [last],
        [turned[rotation]] * places,
        dense_parameters(shape),
        "bfloat16",
    )
    config.save_pretrained(directory)
    return sum(torch.Size(size).numel() for size in expected_shapes(config).values())


def adapter_of(directory: Path, rank: int) -> Path:
    """Where a model's adapter of a rank is."""
    return directory / f"adapter-{rank}"


def adapter_options(directory: Path, rank: int | None) -> tuple[Any, dict[str, Any]]:
    """Return vLLM's request for a model's adapter and the engine's options; none without a rank."""
    if rank is None:
        return None, {}
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(adapter_of(directory, rank)))
    return request, {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def write_adapter(directory: Path, rank: int) -> None:
    """Write a LoRA adapter of every linear of a model's layers, as peft does.

    Args:
        directory: of the config of a dense or a sliced model.
        rank: of the adapter.

    """
    config = AutoConfig.from_pretrained(directory)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config)
    name = config.description.architecture if isinstance(config, SlicedConfig) else None
    architecture = find_architecture(name or config.architectures[0])
    linears = adapted_linears(architecture)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for path, module in model.named_modules():
        if not path.startswith(f"{architecture.layers}.") or not path.endswith(tuple(linears)):
            continue
        outputs, inputs = module.weight.shape
        # Small, so that the stream stays about what it was.
        for factor, size, scale in (("A", (rank, inputs), 1.0), ("B", (outputs, rank), 1e-2)):
            drawn = torch.randn(size, generator=generator) * scale * inputs**-0.5
            factors[f"base_model.model.{path}.lora_{factor}.weight"] = drawn.bfloat16()
    adapter = adapter_of(directory, rank)
    adapter.mkdir(exist_ok=True)
    save_file(factors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": linears}
    (adapter / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.25])
    parser.add_argument("--rotation", choices=ROTATIONS, nargs="+", default=ROTATIONS)
    parser.add_argument("--rank", type=int, help="of low-rank rotations (default: the slicer's)")
    parser.add_argument("--round-to", type=int, default=128)
    options = parser.parse_args()
    dense = write_dense_shape(options.shape, options.output / "dense")
    print(f"dense {dense:,} parameters")
    for fraction in options.fraction:
        for rotation in options.rotation:
            name = f"{rotation}-{fraction}"
            count = write_sliced_shape(
                options.shape, options.output / name, fraction, rotation, options.round_to,
                options.rank,
            )  # fmt: skip
            print(f"{name} {count:,} parameters ({count / dense:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
