"""Dummy weights under which the residual stream of a sliced model keeps its size.

vLLM draws dummy weights from ±0.001. Whole rotations of such numbers leave zeros of the stream
after some layers, and a GPU multiplies zeros faster than numbers: it takes less power, so that its
clock stays higher.
"""

import torch
from torch import Tensor, nn

from sliceserve.server.fused import FusedDecoderLayer
from sliceserve.server.layers import SlicedDecoderLayer


@torch.no_grad()
def keep_stream(model: nn.Module) -> int:
    """Draw whole rotations S [width, next width] anew, such that x·S is on average as large as x.

    Args:
        model: one of vLLM's, with dummy weights; left as it is where it is not sliced, and
            where its weights are packed already, as on CPUs.

    Returns:
        How many rotations there were.

    """
    found = 0
    for layer in model.modules():
        if not isinstance(layer, FusedDecoderLayer | SlicedDecoderLayer):
            continue
        for index, sublayer in enumerate(layer.architecture.sublayers):
            rotation = _whole_rotation(layer, index)
            if rotation is not None:
                width = layer.get_submodule(sublayer.norm).hidden_size
                generator = torch.Generator(rotation.device).manual_seed(found)
                rotation.normal_(std=width**-0.5, generator=generator)
                found += 1
    return found


def _whole_rotation(layer: nn.Module, index: int) -> Tensor | None:
    """Return what a rank holds of a rotation, a view [next width, width], or None."""
    if isinstance(layer, SlicedDecoderLayer):
        rotation = layer.residual_rotation[index]
        return rotation.weight if isinstance(rotation, nn.Linear) else None
    if not isinstance(layer, FusedDecoderLayer) or layer.ranks[index] is not None:
        return None
    _, size = layer.own_columns[index]
    weight: Tensor = layer.joined_writes[index].weight
    return weight.narrow(1, weight.shape[1] - size, size) if weight.ndim == 2 else None
