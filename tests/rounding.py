"""What engines compute with quantised checkpoints, in Transformers: weights multiplied out, and
rounding to eight or four bits as vLLM does where rotations join linears."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sliceserve.slicing.modeling import SlicedLayer

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448, torch.int8: 127}


def widened(directory: Path, output: Path) -> Path:
    """The same checkpoint with weights multiplied out, and nothing said of eight bits."""
    shutil.copytree(directory, output)
    (file,) = output.glob("*.safetensors")
    tensors = load_file(file)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale")}
    for name, scale in scales.items():
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight].float() * scale
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config))
    return output


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype = FP8) -> Tensor:
    steps = (x / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (steps.round() if dtype == torch.int8 else steps.to(dtype).to(x.dtype)) * scale


def scale_of(x: Tensor, dtype: torch.dtype = FP8) -> Tensor:
    """The scale of each row."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST[dtype]


def round_joined_int8(model: nn.Module, directory: Path) -> None:
    """Round low-rank rotations of all layers, and what they and all linears read, in place.

    Args:
        model: a sliced model with the weights of a checkpoint in int8, multiplied out; each of its
            sublayers writes with one linear.
        directory: of that checkpoint.

    """
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    layers = ((path, one) for path, one in model.named_modules() if isinstance(one, SlicedLayer))
    for path, layer in layers:
        for sublayer, rotation in zip(
            layer.architecture.sublayers, layer.residual_rotation, strict=True
        ):
            down, up = rotation.get_submodule("down"), rotation.get_submodule("up")
            (write,) = sublayer.writes
            rows = tensors[f"{path}.{write}.weight_scale"].to(up.weight.device)
            writer = layer.get_submodule(write)
            largest = up.weight.data.abs().amax(1, keepdim=True) / LARGEST[torch.int8]
            # Rows with little of their own beside the rotation's are rounded anew.
            grown = rows.maximum(largest / (4 * (largest / rows).median()))
            if not torch.equal(grown, rows):
                writer.weight.data = rounded(writer.weight.data, grown, torch.int8)
            rows = grown
            balance = (up.weight.data / rows).abs().amax(0) / LARGEST[torch.int8]
            down.weight.data *= balance[:, None]
            down.weight.data = rounded(
                down.weight.data, scale_of(down.weight.data, torch.int8), torch.int8
            )
            up.weight.data = rounded(up.weight.data / balance, rows, torch.int8)
            for linear in (down, *(layer.get_submodule(name) for name in sublayer.reads)):
                _round_tokens(linear, torch.int8)
            _round_summed(layer.get_submodule(sublayer.norm), down, writer, up, torch.int8)


def round_joined(model: nn.Module, stored: bool) -> None:
    """Round linears and low-rank rotations of all layers to fp8, and what they read, in place.

    Args:
        model: a sliced model, each of whose sublayers writes with one linear.
        stored: whether that linear's scales were chosen before the rotation joined it.

    """
    for layer in (module for module in model.modules() if isinstance(module, SlicedLayer)):
        for sublayer, rotation in zip(
            layer.architecture.sublayers, layer.residual_rotation, strict=True
        ):
            down, up = rotation.get_submodule("down"), rotation.get_submodule("up")
            (writer,) = (layer.get_submodule(path) for path in sublayer.writes)
            _round_readers([down, *(layer.get_submodule(path) for path in sublayer.reads)])
            _round_written(layer.get_submodule(sublayer.norm), down, writer, up, stored)


def round_rotations(model: nn.Module, group: int, dtype: torch.dtype = torch.float16) -> None:
    """Round low-rank rotations, held in a dtype, to four bits by a scale a group of inputs."""
    for layer in (module for module in model.modules() if isinstance(module, SlicedLayer)):
        for rotation in layer.residual_rotation:
            for linear in rotation.children():
                for columns in linear.weight.data.split(group, 1):
                    held = columns.to(dtype).float()
                    # The largest lies in the middle of two steps: where it goes, the scale decides.
                    scale = (held.abs().amax(1, keepdim=True) / 7.5).to(dtype).float()
                    columns.copy_((held / scale).round().clamp(-8, 7) * scale)


def _round_readers(linears: list[Any]) -> None:
    for linear in linears:
        linear.weight.data = rounded(linear.weight.data, scale_of(linear.weight.data))
        _round_tokens(linear, FP8)


def _round_tokens(linear: nn.Module, dtype: torch.dtype) -> None:
    def round_token(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return rounded(inputs[0], scale_of(inputs[0], dtype), dtype)

    linear.register_forward_pre_hook(round_token)


def _round_written(norm: nn.Module, down: nn.Module, writer: Any, up: Any, stored: bool) -> None:
    """Round two linears whose products are summed by one scale a row, and one a token."""
    own, more = scale_of(writer.weight.data), scale_of(up.weight.data)
    shared = own * 2 ** (more / own).log2().ceil().clamp(min=0) if stored else own.maximum(more)
    for linear in (writer, up):
        linear.weight.data = rounded(linear.weight.data, shared)
    _round_summed(norm, down, writer, up, FP8)


def _round_summed(
    norm: nn.Module, down: nn.Module, writer: Any, up: Any, dtype: torch.dtype
) -> None:
    """Round what two linears read whose products are summed, by one scale a token."""
    scales: dict[str, Tensor] = {}

    def see_stream(_: nn.Module, inputs: tuple[Tensor]) -> None:
        scales["rotation"] = scale_of(down(inputs[0]), dtype)

    def round_branch(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        scales["token"] = scale_of(inputs[0], dtype).maximum(scales["rotation"])
        return rounded(inputs[0], scales["token"], dtype)

    def round_rotation(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return rounded(inputs[0], scales["token"], dtype)

    norm.register_forward_pre_hook(see_stream)
    writer.register_forward_pre_hook(round_branch)
    up.register_forward_pre_hook(round_rotation)
