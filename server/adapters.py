"""Whether LoRA adapters were made for the sliced model that is to be served."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.checkpoint import read_sliced_config
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import ROTATION, expected_shapes

if TYPE_CHECKING:
    from pathlib import Path

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check_adapter(name: str, adapter: Path, directory: Path) -> None:
    """Compare an adapter's shapes with a sliced model's; vLLM finds out late, or not at all.

    Args:
        name: under which it is to be served.
        adapter: a directory as peft writes it; one without safetensors is left to vLLM.
        directory: the sliced checkpoint.

    Raises:
        UserError: the adapter is corrupt, of another width, or adapts what cannot be.

    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return
    option = f"--lora-modules {name}={adapter}"
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            found = {key: tuple(tensors.get_slice(key).get_shape()) for key in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option}: {file.name} is corrupt or truncated: {error}") from error
    config = read_sliced_config(directory)
    layers = find_architecture(config.description.architecture).layers
    shapes = expected_shapes(config)
    for key, shape in found.items():
        match = _FACTOR.fullmatch(key)
        weight = shapes.get(f"{match[1]}.weight") if match else None
        if not match or not weight or not key.startswith(f"base_model.model.{layers}."):
            raise UserError(f"{option}: only linears of the layers can have adapters, not {key}")
        if ROTATION in key:
            raise UserError(f"{option}: rotations cannot have adapters, such as {key}")
        # A is [rank, in] and B [out, rank], the weight [out, in].
        has, needs = (shape[1], weight[1]) if match[2] == "A" else (shape[0], weight[0])
        if has != needs:
            raise UserError(
                f"{option}: it was made for another model: {key} is for {has} columns of the "
                f"stream or the layer, and the sliced model has {needs} there"
            )
