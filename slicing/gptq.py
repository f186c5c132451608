"""GPTQ (arXiv 2210.17323): four-bit weights that answer for each other's rounding.

Columns of a weight are rounded one after the other, those of the largest input first; what one
loses is made good by those still to come, as the second moment of the inputs says. Layers come in
order, and what a layer reads comes from layers that are rounded already.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.dense import DenseModel
from sliceserve.slicing.devices import layers_dtype
from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.memory import TOKENS_PER_BATCH, available_bytes, return_freed_memory
from sliceserve.slicing.moments import SecondMoment
from sliceserve.slicing.packing import Packer
from sliceserve.slicing.recording import record
from sliceserve.slicing.signals import Signals, make_signals
from sliceserve.slicing.source import Location
from sliceserve.slicing.weights import ShardReader

DAMPING = 0.01  # of the mean diagonal, as published
BLOCK = 128  # columns whose errors are passed on together
LEAST, MOST = -8, 7


def round_columns(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """Round a weight to multiples of the scales of its groups, each column after the other.

    Args:
        weight: W, [outputs, inputs].
        scale: of groups of consecutive inputs, [outputs, groups].
        moment: C = Σ xxᵀ of the inputs, [inputs, inputs], float64.

    Returns:
        q·scale with q from -8 to 7, [outputs, inputs] in float64, close to W in
        tr (W - Ŵ)·C·(W - Ŵ)ᵀ.

    """
    order = moment.diagonal().argsort(descending=True)
    inputs = len(order)
    steps = scale.double().repeat_interleave(inputs // scale.shape[1], dim=1)[:, order]
    left = weight.double()[:, order]
    damped = moment[order][:, order]
    damped.diagonal().add_((DAMPING * damped.diagonal().mean()).clamp(min=1e-300))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    # Row i: how columns from i on share the error of column i, those before it being settled.
    shares = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            step, wanted = steps[:, column], left[:, column].clone()
            left[:, column] = (wanted / step).round().clamp(LEAST, MOST) * step
            error = (wanted - left[:, column]) / shares[column, column]
            left[:, column + 1 : end] -= error[:, None] * shares[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ shares[start:end, end:]
    rounded = torch.empty_like(left)
    rounded[:, order] = left
    return rounded


class LayerRounder:
    """Rounds the layers of a sliced checkpoint, one after the other."""

    def __init__(self, directory: Path, config: SlicedConfig, packer: Packer, device: torch.device):
        """Open a checkpoint that is not quantised; its layers run on `device`."""
        architecture = find_architecture(config.description.architecture)
        shards = ShardReader(directory)
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        # Names, a skeleton and a reader: layers need no more of a model, dense or not.
        self.model = DenseModel(
            location=Location(directory, None),
            config=config,
            architecture=architecture,
            skeleton=skeleton,
            reader=shards,
            dtype=config.dtype,
            files=tuple(shards.files),
        )
        self.layers = DenseLayers(self.model, device, layers_dtype(device, config.dtype))
        self.packer = packer

    @torch.no_grad()
    def run(
        self, windows: Tensor, spill: Path, show_progress: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """Give the tensors of the linears of each layer, by their names in the checkpoint.

        Args:
            windows: token ids to calibrate on, [samples, sequence_length].
            spill: a file to make where the memory is too small for the stream.
            show_progress: whether to show a bar.

        Raises:
            UserError: the checkpoint holds values that are not finite.

        """
        layers, architecture = self.layers, self.model.architecture
        batches = list(torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        width = max(self.model.config.description.widths)
        signals = make_signals(
            [batch.numel() * width for batch in batches],
            layers.dtype,
            layers.device,
            available_bytes() // 2,
            spill,
        )
        contexts = record(self.model, batches, layers.device, layers.dtype, signals.__setitem__)
        numbers = tqdm(range(len(layers)), desc="rounding", unit="layer", disable=not show_progress)
        for index, weights in layers.read_ahead(numbers):
            layer = layers.load(index, weights)
            moments = self._moments(layer, signals, contexts[index])
            tensors = {}
            for path, moment in moments.items():
                weight = weights[f"{path}.weight"].to(layers.device)
                scales = self.packer.scales(weight)
                rounded = round_columns(weight, scales, moment)
                layers.assign(layer, f"{path}.weight", rounded)
                for leaf, tensor in self.packer.pack(rounded, scales).items():
                    tensors[f"{architecture.layers}.{index}.{path}.{leaf}"] = tensor.cpu()
            for number in range(len(signals)):
                x = signals[number].to(layers.device)
                signals[number] = layer(x, **contexts[index][len(x)])
            yield tensors
            return_freed_memory()

    def _moments(self, layer: nn.Module, signals: Signals, contexts: Any) -> dict[str, Tensor]:
        """Return the second moment of what each linear of a layer reads, by its path."""
        sublayers = self.model.architecture.sublayers
        # Those that read the stream at one place read the same.
        alike = [(sub.reads, *((path,) for path in sub.writes)) for sub in sublayers]
        moments: dict[str, SecondMoment] = {}
        hooks = []
        for paths in chain.from_iterable(alike):
            linear: Any = layer.get_submodule(paths[0])
            moment = SecondMoment(linear.in_features, self.layers.device)
            hooks.append(linear.register_forward_pre_hook(_adder(moment)))
            moments |= dict.fromkeys(paths, moment)
        for number in range(len(signals)):
            x = signals[number].to(self.layers.device)
            layer(x, **contexts[len(x)])
        for hook in hooks:
            hook.remove()
        return {path: moment.sum for path, moment in moments.items()}


def _adder(moment: SecondMoment) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that adds what a module reads."""

    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moment.add(inputs[0])

    return add
