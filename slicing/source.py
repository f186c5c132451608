"""Where a model lies: a Hugging Face directory, a hub id or a .gguf file; config and tokenizer."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from sliceserve.slicing.errors import UserError, reading

CONFIG_ALONE = ["config.json"]
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Mistral's own format of the same weights, and other formats in folders, double the download.
HUB_IGNORED = ["consolidated*", "tekken.json", "*/*"]
TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
]


@dataclass(frozen=True)
class Location:
    """Where a model lies on this machine: a directory, and the .gguf file in it if it is one."""

    directory: Path
    gguf_file: str | None

    @property
    def path(self) -> Path:
        """The directory, or the .gguf file."""
        return self.directory / (self.gguf_file or "")

    def __str__(self) -> str:
        return repr(str(self.path))

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments by which Transformers loads from here, never running its code."""
        arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": self.directory,
            "trust_remote_code": False,
        }
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def locate(model: str, hub_patterns: Sequence[str] = HUB_PATTERNS) -> Location:
    """Find a model by path, or fetch those of its files that match from the hub by id.

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
        fetched = snapshot_download(
            model, allow_patterns=list(hub_patterns), ignore_patterns=HUB_IGNORED
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = getattr(error, "server_message", None) or str(error)
        message = f"MODEL {model!r} is no directory here and the hub did not give it: "
        raise UserError(message + " ".join(why.split())) from error
    return Location(Path(fetched), None)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: no such file, not JSON, or not an object.

    """
    with reading(f"file {str(path)!r}"):
        fields = json.loads(path.read_text("utf-8"))
    if not isinstance(fields, dict):
        raise UserError(f"file {str(path)!r} holds no JSON object")
    return fields


def load_tokenizer(location: Location) -> Any:
    """Load the tokenizer of a model.

    Raises:
        UserError: the model has none.

    """
    arguments = location.from_pretrained_arguments()
    if not location.gguf_file:
        # A tekken.json beside tokenizer.json would bring another class, which cannot be saved.
        arguments["mistral_format"] = False
    with reading(f"tokenizer of MODEL {location}"):
        return AutoTokenizer.from_pretrained(**arguments)


def copy_tokenizer(location: Location, output: Path) -> None:
    """Copy a model's tokenizer and chat templates as they are; those of a GGUF file are converted.

    Raises:
        OSError: they cannot be written.

    """
    if location.gguf_file:
        try:
            load_tokenizer(location).save_pretrained(output)
        except UserError:
            raise
        except Exception as error:
            # The tokenizers library raises the bare class when the disk is full.
            raise OSError(str(error)) from error
        return
    for pattern in TOKENIZER_FILES:
        for file in location.directory.glob(pattern):
            target = output / file.relative_to(location.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def quiet_transformers() -> None:
    """Show our progress and sentences, not Transformers' bars and advice."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
