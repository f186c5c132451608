"""Attention with `kernels.placed` before it.

That stands where the rotary embedding and vLLM's own update of its KV cache would, and the norm
where it waits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import CompilationConfig, CompilationMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from sliceserve.kernels.placed import placed, turned
from sliceserve.server.roomy import can_make_room

_logger = init_logger("vllm.sliceserve.placing")

OPERATION, UPDATE = "sliceserve::place", "vllm::unified_kv_cache_update"
SAME = "auto"  # what vLLM calls a KV cache of the model's dtype


def _place(
    x: Tensor,
    projected: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    queries: Tensor,
    joined: Tensor,
    eps: float,
    normed: bool,
    layer_name: LayerNameType,
) -> Tensor:
    """Write queries, the KV cache and what is joined; return nothing, for attention to wait for."""
    _, layer, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    heads, size = queries.shape[1:]
    kv_heads = layer.num_kv_heads
    if slots is None:  # a step that only measures memory: nothing is kept
        nothing = queries.new_empty(0, 1, kv_heads, size)
        caches: tuple[Tensor, Tensor] | None = (nothing, nothing)
        kept = positions[:0]
    else:
        caches, kept = split_cache(kv_cache, kv_heads, size), slots
    if caches is not None:
        placed(x, projected, positions, cos_sin, kept, caches, queries, joined, eps, normed)
        return queries.new_empty(0)
    if not kv_cache.is_cpu:
        _logger.warning_once(
            "A KV cache of shape %s is not known; it is written without our kernel, which is slow.",
            tuple(kv_cache.shape),
        )
    k, v = turned(x, projected, cos_sin[positions], kv_heads, queries, joined, eps, normed)
    # Some of vLLM's attention reads them from here as well.
    for own, part in zip(keys_and_values(projected, heads, kv_heads, size), (k, v), strict=True):
        own.copy_(part)
    layer.impl.do_kv_cache_update(layer, k, v, kv_cache, slots)
    return queries.new_empty(0)


def _nothing(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(0)


# The operation lives as long as this does.
_LIBRARY = Library(OPERATION.split("::")[0], "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    op_name=OPERATION.split("::")[1],
    op_func=_place,
    mutates_args=["projected", "queries", "joined"],
    fake_impl=_nothing,
    target_lib=_LIBRARY,
)


def split_cache(kv_cache: Tensor, kv_heads: int, size: int) -> tuple[Tensor, Tensor] | None:
    """Return the keys and values of a layer's FlashAttention cache as views, or None.

    They are [blocks, block size, kv_heads, size]. None: it lies in a way that is not known. vLLM
    0.24 keeps it as [blocks, 2, block size, kv_heads, size], 0.32 as [blocks, kv_heads, block size,
    2·size].
    """
    if kv_cache.is_cpu:
        return None  # what a CPU multiplies lies in tiles
    if kv_cache.ndim == 5 and kv_cache.shape[1] == 2 and kv_cache.shape[3:] == (kv_heads, size):
        keys, values = kv_cache.unbind(1)
        return keys, values
    if kv_cache.ndim == 4 and kv_cache.shape[1::2] == (kv_heads, 2 * size):
        keys, values = torch.split(kv_cache.transpose(1, 2), size, dim=-1)
        return keys, values
    return None


def keys_and_values(
    projected: Tensor, heads: int, kv_heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Return the views of a product that are k and v, [tokens, kv_heads, size]."""
    sizes = [heads * size, kv_heads * size, kv_heads * size]
    _, k, v = torch.split(projected[:, : sum(sizes)], sizes, dim=-1)
    return k.view(-1, kv_heads, size), v.view(-1, kv_heads, size)


class PlacingAttention(nn.Module):
    """vLLM's attention over this rank's heads, of a product not turned and perhaps not normed.

    Its output lies in the first columns of a wider matrix, with what the rotation adds in the last.
    """

    def __init__(self, module: Any, room: int, eps: float, normed: bool) -> None:
        """Take attention and rotary embedding of a `LlamaAttention`, one that `can_place`.

        Args:
            module: vLLM's.
            room: columns of the rotation.
            eps: of the norm before.
            normed: whether that does not wait.

        """
        super().__init__()
        self.attention, self.rotary = module.attn, module.rotary_emb
        self.room, self.eps, self.normed = room, eps, normed

    def forward(self, positions: Tensor, x: Tensor, projected: Tensor) -> Tensor:
        """Attend: the stream and its product to [tokens, heads · size + room]."""
        layer = self.attention
        heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_size
        tokens, width = x.shape[0], heads * size
        # All views come first: vLLM splits the graph at both operations.
        joined = x.new_empty(tokens, width + self.room)
        output = joined[:, :width].view(-1, heads, size)
        queries = x.new_empty(tokens, heads, size)
        # Attention reads keys and values from the cache; it wants some of their shape.
        keys, values = keys_and_values(projected, heads, kv_heads, size)
        name = _encode_layer_name(layer.layer_name)
        cos_sin = self.rotary.cos_sin_cache
        written = torch.ops.sliceserve.place(
            x, projected, positions, cos_sin, queries, joined, self.eps, self.normed, name
        )
        torch.ops.vllm.unified_attention_with_output(
            queries, keys, values, output, name, kv_cache_dummy_dep=written
        )
        return joined


def can_place(module: Any, room: int, vllm_config: VllmConfig) -> bool:
    """Whether `PlacingAttention` does what vLLM's module does.

    Args:
        module: attention, a `LlamaAttention` or another.
        room: columns of the rotation.
        vllm_config: of the engine.

    """
    if type(module) is not LlamaAttention:
        return False
    rotary, attention = module.rotary_emb, module.attn
    return (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_cuda is RotaryEmbedding.forward_cuda
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.rotary_dim == attention.head_size == attention.head_size_v
        and attention.kv_cache_dtype == SAME
        and splits(vllm_config.compilation_config)
        and can_make_room(attention, room, vllm_config)
    )


def splits(compilation: CompilationConfig) -> bool:
    """Whether a model runs uncompiled, or its graph is split where the KV cache is written."""
    if compilation.mode == CompilationMode.NONE:
        return True
    return compilation.mode == CompilationMode.VLLM_COMPILE and UPDATE in (
        compilation.splitting_ops or []
    )


def split_at_placing(compilation: CompilationConfig) -> None:
    """Have vLLM split the graph at our operation, as it does at its own that writes the cache."""
    operations = compilation.splitting_ops
    if operations and OPERATION not in operations:
        operations.append(OPERATION)
