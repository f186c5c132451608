"""Eight-bit sliced checkpoints in the format of compressed-tensors, for vLLM and Transformers.

Linears of the decoder layers get a scale a row, rounded to nearest; what they read is quantised a
token while it runs. Embedding, head and rotations keep their dtype.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sliceserve.slicing.architectures import find_architecture
from sliceserve.slicing.checkpoint import (
    FORMATS,
    PROVENANCE,
    CheckpointSummary,
    check_unquantised,
    quantised_linears,
    read_checkpoint_summary,
    read_sliced_config,
    staged_directory,
)
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.errors import UserError, reason
from sliceserve.slicing.modeling import HEAD_MAP, ROTATION
from sliceserve.slicing.source import Location, copy_tokenizer, read_json_object
from sliceserve.slicing.weights import INDEX, ShardReader, write_tensors


@dataclass(frozen=True)
class Scheme:
    """How linears are quantised.

    Attributes:
        preset: its name in compressed-tensors.
        format: that its weights are stored in.

    """

    preset: str
    format: str


SCHEMES = {
    "fp8": Scheme("FP8_DYNAMIC", FORMATS["fp8"]),
    "int8": Scheme("INT8", FORMATS["int8"]),
}


def run_quantize(
    directory: Path, output: Path, scheme: str, show_progress: bool = True
) -> CheckpointSummary:
    """Quantise a sliced checkpoint, shard by shard; `output` appears when it is complete.

    Args:
        directory: a sliced checkpoint that is not quantised.
        output: directory to make.
        scheme: one of `SCHEMES`.
        show_progress: whether to show a bar.

    Raises:
        UserError: no such checkpoint, one that is quantised, or compressed-tensors is missing.

    """
    summary = read_checkpoint_summary(directory)
    config = read_sliced_config(directory)
    check_unquantised(directory, config, "quantize")
    chosen = SCHEMES[scheme]
    fields = quantisation_fields(config, chosen)
    compress = make_compressor(chosen)
    linears = quantised_linears(config)
    reader = ShardReader(directory)
    with staged_directory(output, summary.bytes) as staging:
        weight_map: dict[str, str] = {}
        total = 0
        for file in tqdm(reader.files, desc="quantising", unit="shard", disable=not show_progress):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(file).items():
                if name in linears:
                    path = name.removesuffix(".weight")
                    tensors |= {f"{path}.{leaf}": x for leaf, x in compress(tensor).items()}
                else:
                    tensors[name] = tensor
            write_tensors(staging / file.name, tensors)
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if (directory / INDEX).exists():
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        written = read_json_object(directory / "config.json") | {"quantization_config": fields}
        (staging / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        copy_tokenizer(Location(directory, None), staging)
        for file in (directory / "generation_config.json", directory / PROVENANCE):
            if file.is_file():
                (staging / file.name).write_bytes(file.read_bytes())
        read_checkpoint_summary(staging)
    return read_checkpoint_summary(output)


def quantisation_fields(config: SlicedConfig, scheme: Scheme) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    with _compressed_tensors():
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

        architecture = find_architecture(config.description.architecture)
        fields = QuantizationConfig(
            config_groups={"group_0": preset_name_to_scheme(scheme.preset, ["Linear"])},
            format=scheme.format,
            quantization_status="compressed",
            ignore=[architecture.head, HEAD_MAP, f"re:.*{ROTATION}.*"],
        ).model_dump(mode="json")
    return dict(fields)


def make_compressor(scheme: Scheme) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return what turns a weight [outputs, inputs] into its tensors: "weight", "weight_scale"."""
    with _compressed_tensors():
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams

        preset = preset_name_to_scheme(scheme.preset, ["Linear"])
        compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def compress(weight: Tensor) -> dict[str, Tensor]:
        low, high = torch.aminmax(weight.float(), dim=1, keepdim=True)
        scale, _ = calculate_qparams(low, high, preset.weights)
        state = {"weight": weight.float(), "weight_scale": scale}
        compressed: dict[str, Tensor] = compressor.compress(state, preset)
        return compressed

    return compress


@contextmanager
def _compressed_tensors() -> Iterator[None]:
    """Say in one sentence that the library is missing, or another version than is known.

    Raises:
        UserError: the block could not find something in it.

    """
    try:
        yield
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"quantize needs compressed-tensors 0.17, which comes with vLLM: {reason(error)}"
        ) from error
