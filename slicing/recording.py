"""What a model hands its decoder layers, recorded from Transformers' own forward pass.

Embeddings, masks, positions and rotary tables come from there, so that no architecture needs code
for them here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sliceserve.slicing.dense import DenseModel

Contexts = dict[int, dict[str, Any]]  # keyword arguments of a layer, by batch size


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: Contexts = {}
        self.stream = torch.empty(0)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.contexts[len(hidden_states)] = context
        self.stream = hidden_states
        return hidden_states


def record(
    model: DenseModel,
    batches: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    take: Callable[[int, Tensor], None],
) -> list[Contexts]:
    """Run the part of a model before its layers; its skeleton is afterwards as it was.

    Args:
        model: the dense model.
        batches: token ids, [windows, positions] each.
        device: to run on.
        dtype: of the stream.
        take: called with each batch's number and stream [windows, positions, hidden_size].

    Returns:
        The contexts of each layer.

    """
    architecture, skeleton = model.architecture, model.skeleton
    layers: Any = skeleton.get_submodule(architecture.layers)
    real_layers, real_norm = list(layers), skeleton.get_submodule(architecture.final_norm)
    recorders = [_Recorder() for _ in real_layers]
    _replace(layers, recorders)
    skeleton.set_submodule(architecture.final_norm, nn.Identity())
    _move_buffers(skeleton, device)
    tokens = model.read(f"{architecture.tokens}.weight")
    if architecture.positions:
        table: Any = skeleton.get_submodule(architecture.positions)
        rows = model.read(f"{architecture.positions}.weight").to(device, dtype)
        table.weight = nn.Parameter(rows, requires_grad=False)
    for index, batch in enumerate(batches):
        embedded = tokens[batch].to(device, dtype)
        skeleton.base_model(inputs_embeds=embedded, use_cache=False)  # type: ignore[operator]
        take(index, recorders[0].stream)
    if architecture.positions:
        table.to("meta")
    _replace(layers, real_layers)
    skeleton.set_submodule(architecture.final_norm, real_norm)
    return [recorder.contexts for recorder in recorders]


def _replace(layers: nn.ModuleList, others: list[Any]) -> None:
    for index, other in enumerate(others):
        layers[index] = other


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what is real (rotary tables); parameters stay on the meta device."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
