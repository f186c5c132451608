"""A sliced model whose places share one basis, as an ordinary checkpoint of its architecture.

Nothing is left to rotate between such places, so the model is a dense one with a narrow hidden_size
and a head_dim of its own: engines run it without this package.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    read_checkpoint_summary,
    read_sliced_config,
    staged_directory,
)
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import HEAD_MAP
from sliceserve.slicing.quantised import check_unquantised
from sliceserve.slicing.source import Location, copy_tokenizer
from sliceserve.slicing.weights import INDEX, ShardReader, write_tensors


@dataclass(frozen=True)
class Exported:
    """What was written: the directory, its architecture, hidden_size and parameters."""

    directory: Path
    architecture: str
    hidden_size: int
    parameters: int


def run_export(directory: Path, output: Path) -> Exported:
    """Write a sliced checkpoint as one of its base architecture; `output` appears when complete.

    Raises:
        UserError: not a sliced checkpoint, one with rotations or of several widths, or one whose
            architecture cannot hold what it computes.

    """
    summary = read_checkpoint_summary(directory)
    config = read_sliced_config(directory)
    check_unquantised(directory, config, "export")
    architecture = find_architecture(summary.slicing.architecture)
    width = check_exportable(directory, config)
    reader = ShardReader(directory)
    fields = dense_fields(config, architecture, width)
    embedding = reader.read(f"{architecture.tokens}.weight")
    with staged_directory(output, summary.bytes + embedding.nbytes) as staging:
        parameters = 0
        weight_map: dict[str, str] = {}
        total = 0
        for number, file in enumerate(reader.files, start=1):
            tensors = dense_tensors(load_file(file), embedding, architecture, width)
            if number == 1:
                final = torch.ones(width, dtype=embedding.dtype)
                tensors[f"{architecture.final_norm}.weight"] = final
            name = f"model-{number:05d}-of-{len(reader.files):05d}.safetensors"
            write_tensors(staging / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            parameters += sum(tensor.numel() for tensor in tensors.values())
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (staging / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        copy_tokenizer(Location(directory, None), staging)
        for name in ("generation_config.json", PROVENANCE):
            if (directory / name).is_file():
                (staging / name).write_bytes((directory / name).read_bytes())
    return Exported(output, architecture.causal_lm, width, parameters)


def check_exportable(directory: Path, config: SlicedConfig) -> int:
    """Return the one width of a model that its base architecture can hold.

    Raises:
        UserError: it has rotations or several widths, LayerNorms, or heads of a derived size.

    """
    slicing = config.description
    architecture = find_architecture(slicing.architecture)
    if any(rank != 0 for rank in slicing.ranks) or len(set(slicing.widths)) > 1:
        raise UserError(
            f"DIR {str(directory)!r} has rotations between its sublayers, which no ordinary "
            "checkpoint holds: slice with --rotation shared"
        )
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(config.base())
    if isinstance(base.get_submodule(architecture.final_norm), nn.LayerNorm):
        raise UserError(
            f"DIR {str(directory)!r}: {architecture.causal_lm} has LayerNorms, which would take "
            "a mean out of the sliced stream"
        )
    if architecture.derives_head_dim:
        raise UserError(
            f"DIR {str(directory)!r}: engines derive the head_dim of {architecture.causal_lm} "
            "from its hidden_size, which is narrower now"
        )
    return slicing.widths[0]


def dense_fields(config: SlicedConfig, architecture: Architecture, width: int) -> dict[str, Any]:
    """Return the config.json of the narrow model."""
    fields: dict[str, Any] = config.base().to_dict()
    fields |= {
        "architectures": [architecture.causal_lm],
        "hidden_size": width,
        "head_dim": config.head_dim,
        "tie_word_embeddings": False,
        "dtype": str(config.dtype).removeprefix("torch."),
        # rsqrt(mean(x²) + eps·D/d) is the dense norm but for a constant that the readers hold.
        str(architecture.norm_eps): architecture.epsilon(config) * config.hidden_size / width,
    }
    fields.pop("slicing", None)
    return fields


def dense_tensors(
    tensors: dict[str, Tensor], embedding: Tensor, architecture: Architecture, width: int
) -> dict[str, Tensor]:
    """Return one shard's tensors, with norms of ones and a tied head written out."""
    result = dict(tensors)
    head_map = result.pop(f"{HEAD_MAP}.weight", None)
    if head_map is not None:
        head = embedding.double() @ head_map.double()
        result[f"{architecture.head}.weight"] = head.to(embedding.dtype)
    first = architecture.sublayers[0].reads[0]
    for name in tensors:
        layer, found, _ = name.partition(f".{first}.weight")
        if found:
            for sublayer in architecture.sublayers:
                result[f"{layer}.{sublayer.norm}.weight"] = torch.ones(width, dtype=embedding.dtype)
    return result
