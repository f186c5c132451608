"""Dummy weights under which the residual stream of a sliced model keeps its size.

vLLM draws dummy weights from ±0.001. Whole rotations of such numbers leave zeros of the stream
after some layers, and a GPU at its limit of power multiplies zeros faster than numbers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank

from sliceserve.server.fused import FusedDecoderLayer
from sliceserve.server.layers import SlicedDecoderLayer


@torch.no_grad()
def keep_stream(model: nn.Module) -> int:
    """Draw whole rotations S [width, next width] anew: elements of x·S are about as large as x's.

    Args:
        model: one of vLLM's, with dummy weights; left as it is where it is not sliced, and where
            its joined weights are packed already, as on CPUs.

    Returns:
        How many rotations were drawn.

    """
    drawn = 0
    for layer in model.modules():
        if not isinstance(layer, FusedDecoderLayer | SlicedDecoderLayer):
            continue
        for index, sublayer in enumerate(layer.architecture.sublayers):
            rotation = _whole_rotation(layer, index)
            if rotation is None:
                continue
            norm: Any = layer.get_submodule(sublayer.norm)
            generator = torch.Generator(rotation.device).manual_seed(_seed(layer, drawn))
            rotation.normal_(std=norm.hidden_size**-0.5, generator=generator)
            drawn += 1
    return drawn


def _whole_rotation(layer: FusedDecoderLayer | SlicedDecoderLayer, index: int) -> Tensor | None:
    """Return what a rank holds of a rotation, [next width, inputs of this rank], or None."""
    if isinstance(layer, SlicedDecoderLayer):
        rotation = layer.residual_rotation[index]
        return rotation.weight if isinstance(rotation, nn.Linear) else None
    if layer.ranks[index] is not None:
        return None  # of four bits there would be no weight
    _, writes = layer.joined(index)
    weight: Tensor = writes.weight
    _, size = layer.own_columns[index]
    # Eight bits have been turned, and take no random numbers; four are no matrix.
    plain = weight.ndim == 2 and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return weight.narrow(1, weight.shape[1] - size, size) if plain else None


def _seed(layer: nn.Module, number: int) -> int:
    """Return a seed; ranks that share a rotation draw different parts of it."""
    sharded = isinstance(layer, FusedDecoderLayer)
    return number + (get_tensor_model_parallel_rank() << 16 if sharded else 0)
