"""Which of vLLM's quantised linears take rotations in, as more of their rows and columns."""

from typing import Any

from vllm.model_executor.layers.linear import LinearBase

from sliceserve.server.eight_bits import takes_eight_bit_rotations
from sliceserve.server.packed import group_size
from sliceserve.slicing.architectures import Architecture


def probe_linear(quant_config: Any, prefix: str) -> LinearBase:
    """Make a linear that is quantised as those of a layer, to look at.

    Args:
        quant_config: of vLLM, or None.
        prefix: the layer's path.

    """
    return LinearBase(16, 16, quant_config=quant_config, prefix=f"{prefix}.joined_reads.0")


def takes_rotations(
    quant_config: Any, architecture: Architecture, ranks: list[int | None], prefix: str
) -> bool:
    """Whether linears quantised so can have a layer's rotations as more of their rows and columns.

    Whole rotations do not bear it: those are not rounded.

    Args:
        quant_config: of vLLM.
        architecture: of the layer.
        ranks: of the layer's rotations.
        prefix: the layer's path.

    """
    if None in ranks:
        return False
    probe = probe_linear(quant_config, prefix)
    if group_size(probe) is not None:
        return True
    return takes_eight_bit_rotations(probe, quant_config, architecture)
