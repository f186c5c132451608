"""How many GPUs a model needs: in a pipeline of whole layers, and split by tensor parallelism."""

from collections.abc import Sequence
from typing import Any

from sliceserve.slicing.config import head_dim
from sliceserve.slicing.footprint import Footprint, Part, key_value_heads


def stages(model: Footprint, gpu_bytes: int) -> list[int] | None:
    """Return the layers on each GPU of the shortest pipeline; None if one layer is too large.

    Consecutive whole layers go to a GPU until it is full. The embedding is with the first layer and
    the head with the last; every GPU keeps a full reserve for activations.

    Args:
        model: what is to be placed.
        gpu_bytes: of one GPU, that weights, cache and activations may take.

    """
    room = gpu_bytes - model.activations.bytes
    layers = [
        layer.bytes + rotation.bytes + model.cache.bytes
        for layer, rotation in zip(model.layers, model.rotations, strict=True)
    ]
    if sum(layers) + model.embedding.bytes + model.head.bytes <= room:
        return [len(layers)]
    layers[0] += model.embedding.bytes
    layers[-1] += model.head.bytes + model.tied.bytes
    return _filled(layers, room)


def _filled(sizes: Sequence[int], room: int) -> list[int] | None:
    """Fill bins of one size in order, which needs the fewest; return the items in each."""
    counts, left = [0], room
    for size in sizes:
        if size > room:
            return None
        if size > left:
            counts.append(0)
            left = room
        counts[-1] += 1
        left -= size
    return counts


def tensor_parallel_gpus(
    model: Footprint, config: Any, gpu_bytes: int, group_size: int | None
) -> int | None:
    """Return the smallest tensor-parallel size that fits, None if none does.

    Args:
        model: what is to be split.
        config: of the model, dense or sliced.
        gpu_bytes: of one GPU, that weights, cache and activations may take.
        group_size: of quantised linears: inputs that share a scale; None if that is a row.

    """
    for ranks in tensor_parallel_sizes(config, group_size):
        if tensor_parallel_bytes(model, ranks) <= gpu_bytes:
            return ranks
    return None


def tensor_parallel_bytes(model: Footprint, ranks: int) -> int:
    """Return the bytes on each of so many tensor-parallel ranks."""
    parts = [model.embedding, model.head, model.activations, *model.layers, *model.rotations]
    cache = Part(split=model.cache.split * len(model.layers))
    return sum(part.share(ranks) for part in (*parts, cache))


def tensor_parallel_sizes(config: Any, group_size: int | None = None) -> list[int]:
    """Return the sizes that divide attention heads, key-value heads and the MLP's width.

    Of linears whose inputs share scales in groups, no rank gets a part of a group.
    """
    heads = key_value_heads(config)
    inner = getattr(config, "intermediate_size", None) or config.ffn_dim
    whole = (int(config.num_attention_heads), int(inner))
    # What linears read whose inputs are split.
    inputs = (whole[0] * head_dim(config), whole[1])
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0
        and all(number % size == 0 for number in whole)
        and (size == 1 or all(number % (size * (group_size or 1)) == 0 for number in inputs))
    ]
