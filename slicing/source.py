"""The dense model to slice: a Hugging Face directory, a hub id or a .gguf file."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from sliceserve.slicing.architectures import Architecture, architecture_of
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.weights import (
    MemoryReader,
    ShardReader,
    TensorReader,
    check_shapes,
    hash_files,
)

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Location:
    """Where a model lies on this machine: a directory, and the .gguf file in it if it is one."""

    directory: Path
    gguf_file: str | None

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments by which Transformers loads from here."""
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": self.directory}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def locate(model: str) -> Location:
    """Find a model by path, or fetch it from the hub by id.

    Raises:
        UserError: there is no such path, and no such model on the hub or no way to reach it.

    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Location(path, None)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"MODEL {model!r} does not exist")
        return Location(path.parent, path.name)
    if path.exists():
        raise UserError(f"MODEL {model!r} is neither a directory nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"MODEL {model!r} does not exist and is no hub id such as owner/name")
    try:
        return Location(Path(snapshot_download(model, allow_patterns=HUB_PATTERNS)), None)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"MODEL {model!r} is no directory here and the hub did not give it: {reason}"
        raise UserError(message) from error


def read_dense_config(location: Location) -> PreTrainedConfig:
    """Read the config of a model that is to be sliced.

    Raises:
        UserError: there is no readable config, or the model is sliced or quantised already.

    """
    arguments = location.from_pretrained_arguments()
    if not location.gguf_file and not (location.directory / "config.json").is_file():
        raise UserError(f"MODEL {str(location.directory)!r} holds no config.json")
    try:
        config = AutoConfig.from_pretrained(**arguments)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"config of MODEL {str(location.directory)!r} cannot be read: {reason}"
        raise UserError(message) from error
    if config.model_type == MODEL_TYPE:
        raise UserError(f"MODEL {str(location.directory)!r} is sliced already")
    if location.gguf_file:
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    elif getattr(config, "quantization_config", None):
        raise UserError(
            f"MODEL {str(location.directory)!r} is quantised; slice the unquantised checkpoint"
        )
    return config


@dataclass(frozen=True)
class DenseModel:
    """A dense model on disk, its modules on the meta device and its weights read when asked for.

    Attributes:
        location: where it lies.
        config: its Transformers config.
        architecture: the description of its class.
        reader: its stored tensors.
        files: the weight files.
        skeleton: the Transformers model; parameters on the meta device, buffers real.
        dtype: of the stored weights (bfloat16 for a GGUF file, which has many).
        parameters: as its user stores them, tied tables counted once.

    """

    location: Location
    config: PreTrainedConfig
    architecture: Architecture
    skeleton: nn.Module
    reader: TensorReader
    dtype: torch.dtype
    parameters: int
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """Return one weight by its name in the skeleton; a tied head is the embedding."""
        if self.config.tie_word_embeddings and name == f"{self.architecture.head}.weight":
            name = f"{self.architecture.embeddings[0]}.weight"
        return self.reader.read(name)

    def tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            UserError: the model has none.

        """
        return load_tokenizer(self.location)

    def sha256(self) -> str:
        """Return the SHA-256 (hex) over the weight files."""
        return hash_files(self.files)


def open_dense_model(model: str) -> DenseModel:
    """Open a model for slicing and check every tensor's name and shape, without computing.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file.

    Raises:
        UserError: no such model, an unsupported architecture, corrupt or missing weights.

    """
    location = locate(model)
    config = read_dense_config(location)
    architecture = architecture_of(config)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    reader: TensorReader
    if location.gguf_file:
        files: tuple[Path, ...] = (location.directory / location.gguf_file,)
        reader = MemoryReader(read_gguf(location))
        dtype = torch.bfloat16
    else:
        shards = ShardReader(location.directory)
        reader, files = shards, tuple(shards.files)
        dtype = getattr(torch, str(config.dtype).removeprefix("torch."), torch.float32)
    expected = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    if config.tie_word_embeddings:
        expected.pop(f"{architecture.head}.weight", None)
    check_dense_shapes(model, reader.shapes(), expected, architecture)
    parameters = sum(torch.Size(shape).numel() for shape in expected.values())
    return DenseModel(location, config, architecture, skeleton, reader, dtype, parameters, files)


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
    model.tokenizer().save_pretrained(output)


def check_dense_shapes(
    model: str,
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
    check_shapes(f"MODEL {model!r}", needed, expected)


def read_gguf(location: Location) -> dict[str, Tensor]:
    """Dequantise a GGUF file through Transformers; names and layout are the dense model's.

    Raises:
        UserError: the file is corrupt or truncated.

    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **location.from_pretrained_arguments(), dtype=torch.float32
        )
    except (ValueError, OSError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"GGUF file {location.gguf_file!r} is corrupt or truncated: {reason}"
        raise UserError(message) from error
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_tokenizer(location: Location) -> Any:
    """Load the tokenizer of a model.

    Raises:
        UserError: the model has none.

    """
    try:
        return AutoTokenizer.from_pretrained(**location.from_pretrained_arguments())
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"MODEL {str(location.directory)!r} has no readable tokenizer: {reason}"
        raise UserError(message) from error


def quiet_transformers() -> None:
    """Show our progress and sentences, not Transformers' bars and advice."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
