"""LoRA adapters of sliced models, made with peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

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
