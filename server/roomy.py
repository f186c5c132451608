"""Attention whose output lies in a matrix with room for the columns that are joined with it.

What a rotation reads then needs no pass over memory that copies attention's output beside it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name

STORED_AT_ONCE = 16  # bytes
WRITES_APART = ("FLASH_ATTN",)  # backends whose rows need not follow each other


class RoomyAttention(nn.Module):
    """vLLM's attention over the heads of this rank, into the first columns of a wider matrix."""

    def __init__(self, attention: Any, room: int) -> None:
        """Wrap vLLM's layer, which keeps its name, its KV cache and its scales.

        Args:
            attention: the layer, one that `can_make_room`.
            room: columns after its own, to be written by who asked for them.

        """
        super().__init__()
        self.attention = attention
        self.room = room

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: [tokens, heads · head size] each, to [tokens, heads · head size + room]."""
        layer = self.attention
        heads, size = layer.num_heads, layer.head_size_v
        joined = query.new_empty(query.shape[0], heads * size + self.room)
        output = joined[:, : heads * size].view(-1, heads, size)
        # All views come first: vLLM splits the graph at both operations.
        queries = query.view(-1, heads, layer.head_size)
        keys = key.view(-1, layer.num_kv_heads, layer.head_size)
        values = value.view(-1, layer.num_kv_heads, size)
        name = _encode_layer_name(layer.layer_name)
        # vLLM orders the two by what the first returns.
        written = torch.ops.vllm.unified_kv_cache_update(keys, values, name)
        torch.ops.vllm.unified_attention_with_output(
            queries,
            keys,
            values,
            output,
            name,
            kv_cache_dummy_dep=written,
        )
        return joined


def can_make_room(attention: Any, room: int, vllm_config: VllmConfig) -> bool:
    """Whether vLLM runs a layer as `RoomyAttention` does, and writes rows that lie apart right.

    Cascade attention and contexts that are spread over GPUs end in a kernel that takes rows to lie
    one after the other.

    Args:
        attention: vLLM's layer.
        room: columns to leave.
        vllm_config: of the engine.

    """
    return (
        room * vllm_config.model_config.dtype.itemsize % STORED_AT_ONCE == 0
        # Elsewhere another backend has the same name.
        and (current_platform.is_cuda() or current_platform.is_cpu())
        and attention.attn_backend.get_name() in WRITES_APART
        and not attention.attn_backend.forward_includes_kv_cache_update
        and not attention.use_direct_call
        and attention.kv_sharing_target_layer_name is None
        and attention.query_quant is None
        and not getattr(attention, "calculate_kv_scales", False)
        and vllm_config.model_config.disable_cascade_attn
        and vllm_config.parallel_config.decode_context_parallel_size == 1
    )
