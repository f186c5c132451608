"""The dense model that is to be sliced: checked against its config, its weights read lazily."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sliceserve.slicing.architectures import Architecture, check_variant, find_architecture
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.errors import UserError, reading
from sliceserve.slicing.source import Location, copy_tokenizer, locate, read_json_object
from sliceserve.slicing.weights import (
    MemoryReader,
    ShardReader,
    TensorReader,
    check_shapes,
    hash_files,
)


@dataclass(frozen=True)
class DenseOutline:
    """A dense model as its config describes it, without weights.

    Attributes:
        location: where it lies.
        config: its Transformers config.
        architecture: the description of its class.
        skeleton: the Transformers model; parameters on the meta device, buffers real.

    """

    location: Location
    config: PreTrainedConfig
    architecture: Architecture
    skeleton: nn.Module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that its user stores, tied tables once."""
        shapes = {name: tuple(p.shape) for name, p in self.skeleton.named_parameters()}
        if self.config.tie_word_embeddings:
            shapes.pop(f"{self.architecture.head}.weight", None)
        return shapes

    @property
    def parameters(self) -> int:
        """Numbers in these tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())


@dataclass(frozen=True)
class DenseModel(DenseOutline):
    """A dense model on disk; its weights are read when asked for.

    Attributes:
        reader: its stored tensors.
        dtype: of the stored weights (bfloat16 for a GGUF file, which has many).
        files: the weight files.

    """

    reader: TensorReader
    dtype: torch.dtype
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """Return one weight by its name in the skeleton; a tied head is the embedding."""
        if self.config.tie_word_embeddings and name == f"{self.architecture.head}.weight":
            name = f"{self.architecture.tokens}.weight"
        return self.reader.read(name)

    def sha256(self) -> str:
        """Return the SHA-256 (hex) over the weight files."""
        return hash_files(self.files)


def open_dense_model(model: str, revision: str | None = None) -> DenseModel:
    """Open a model for slicing and check every tensor's name and shape, without computing.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file.
        revision: of a model on the hub, a commit, tag or branch; None takes its main branch.

    Raises:
        UserError: no such model, an unsupported architecture, corrupt or missing weights.
        MachineError: the hub did not answer.

    """
    location = locate(model, revision=revision)
    outline = outline_dense_model(location)
    reader: TensorReader
    if location.gguf_file:
        files: tuple[Path, ...] = (location.path,)
        reader = MemoryReader(read_gguf(location))
    else:
        shards = ShardReader(location.directory)
        reader, files = shards, tuple(shards.files)
    architecture = outline.architecture
    check_dense_shapes(location, reader.shapes(), outline.shapes(), architecture)
    # A GGUF file has many dtypes. Some checkpoints keep their norms in float32, hence the table's.
    table = f"{architecture.tokens}.weight"
    dtype = torch.bfloat16 if location.gguf_file else shards.dtype([table])
    return DenseModel(**vars(outline), reader=reader, dtype=dtype, files=files)


def outline_dense_model(location: Location) -> DenseOutline:
    """Outline a model from its config alone.

    Raises:
        UserError: there is no readable config, or the model is not one that can be sliced.

    """
    config = read_dense_config(location)
    architecture = find_architecture(config.architectures[0])
    check_variant(f"MODEL {location}", config, architecture)
    with reading(f"config of MODEL {location}"), init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    check_covered(location, skeleton, architecture)
    return DenseOutline(location, config, architecture, skeleton)


def read_dense_config(location: Location) -> PreTrainedConfig:
    """Read the config of a model that is to be sliced.

    Raises:
        UserError: there is no readable config, the architecture is not supported, or the model is
            sliced or quantised already.

    """
    if location.gguf_file:
        return _gguf_config(location)
    path = location.directory / "config.json"
    if not path.is_file():
        raise UserError(f"MODEL {location} holds no config.json")
    fields = read_json_object(path)
    if fields.get("model_type") == MODEL_TYPE:
        raise UserError(f"MODEL {location} is sliced already")
    names = fields.get("architectures")
    if not isinstance(names, list) or [type(name) for name in names] != [str]:
        raise UserError(f"config.json of MODEL {location} must name one architecture, not {names}")
    find_architecture(names[0])
    if fields.get("quantization_config"):
        raise UserError(f"MODEL {location} is quantised; slice the unquantised checkpoint")
    with reading(f"config of MODEL {location}"):
        return AutoConfig.from_pretrained(**location.from_pretrained_arguments())


def _gguf_config(location: Location) -> PreTrainedConfig:
    with reading(f"GGUF file {location}"):
        header = GGUFReader(location.path)
        scaled = any(name.endswith(".rope.scaling.type") for name in header.fields)
        scaled = scaled or any(tensor.name == "rope_freqs.weight" for tensor in header.tensors)
        config = AutoConfig.from_pretrained(**location.from_pretrained_arguments())
    if scaled:
        # Transformers drops it without a word, and the model is wrong at every position.
        raise UserError(
            f"GGUF file {location} scales its rotary embedding, which is lost in the conversion: "
            "slice the Hugging Face checkpoint of the model"
        )
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    find_architecture(config.architectures[0])
    return config


def check_covered(location: Location, skeleton: nn.Module, architecture: Architecture) -> None:
    """Check that every parameter lies in a module that the description names.

    Raises:
        UserError: lists those that do not: such a model has parts that would be left as they are.

    """
    known = (*architecture.tables, architecture.layers, architecture.final_norm, architecture.head)
    prefixes = tuple(f"{path}." for path in known)
    strange = [name for name, _ in skeleton.named_parameters() if not name.startswith(prefixes)]
    if strange:
        raise UserError(
            f"MODEL {location}: {architecture.causal_lm} with parts that are not supported: "
            + ", ".join(strange)
        )


def read_gguf(location: Location) -> dict[str, Tensor]:
    """Dequantise a GGUF file through Transformers; names and layout are the dense model's.

    Raises:
        UserError: the file is corrupt or truncated.

    """
    with reading(f"GGUF file {location}"):
        model = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=torch.float32
        )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_dense_shapes(
    location: Location,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
) -> None:
    """Check a dense checkpoint's tensors; old ones carry rotary buffers and the tied head twice.

    Raises:
        UserError: lists all missing, unexpected and misshapen tensors in one sentence.

    """
    derived = (".rotary_emb.inv_freq", f"{architecture.head}.weight")
    needed = {
        name: shape
        for name, shape in found.items()
        if name in expected or not name.endswith(derived)
    }
    check_shapes(f"MODEL {location}", needed, expected)


def write_dense(model: DenseModel, output: Path, dtype: torch.dtype) -> None:
    """Write a dense model out as an ordinary Hugging Face checkpoint, for instance a GGUF file.

    Args:
        model: from `open_dense_model`.
        output: directory to make.
        dtype: of the weights written.

    """
    dense: Any = type(model.skeleton)(model.config).to(dtype)
    weights = {name: model.read(name) for name, _ in model.skeleton.named_parameters()}
    dense.load_state_dict(weights, strict=False)
    dense.tie_weights()
    # Transformers refuses to save what came from a GGUF file as long as its config says so.
    vars(dense.config).pop("quantization_config", None)
    dense.save_pretrained(output)
    copy_tokenizer(model.location, output)
