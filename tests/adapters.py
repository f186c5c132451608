"""LoRA adapters of sliced models, made with peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.finetune import adapted_linears
from sliceserve.slicing.modeling import SlicedForCausalLM


def make_adapter(sliced: Path, size: float = 0.15) -> tuple[Path, Path]:
    """Make a random adapter of a sliced model, its elements of a size; and both merged."""
    model: Any = SlicedForCausalLM.from_pretrained(sliced, dtype=torch.float32)
    architecture = find_architecture(model.config.description.architecture)
    targets = adapted_linears(architecture)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    adapter, merged = (sliced.with_name(f"{sliced.name}-{kind}") for kind in ("adapter", "merged"))
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(merged)
    return adapter, merged


def add_adapter(model: nn.Module, adapter: Path) -> None:
    """Have linears of a model add what an adapter computes of what they are given.

    What rounds their inputs is to be added afterwards: adapters read inputs as they were.
    """
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, down in factors.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = factors[name.replace(".lora_A.", ".lora_B.")]
            _add_factors(model.get_submodule(path), down, 2 * up)  # lora_alpha / r


def _add_factors(linear: nn.Module, down: Tensor, up: Tensor) -> None:
    given: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
        given[:] = inputs

    def add(_: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + given[0] @ down.T.to(output) @ up.T.to(output)

    linear.register_forward_pre_hook(see)
    linear.register_forward_hook(add)
