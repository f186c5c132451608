"""Where a model lies: a Hugging Face directory, a hub id or a .gguf file; config and tokenizer."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from sliceserve.slicing.errors import MachineError, UserError, reading

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
TRY_AGAIN = {408, 425, 429}  # of the hub's answers from 400 to 499 those that may change
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Location:
    """Where a model lies on this machine.

    Attributes:
        directory: that holds it.
        gguf_file: the name of the .gguf file in it; None for a Hugging Face directory.
        commit: of a model from the hub, 40 hexadecimal digits.

    """

    directory: Path
    gguf_file: str | None
    commit: str | None = None

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


def locate(
    model: str, hub_patterns: Sequence[str] = HUB_PATTERNS, revision: str | None = None
) -> Location:
    """Find a model by path, or fetch those of its files that match from the hub by id.

    Args:
        model: a directory, a .gguf file or a hub id.
        hub_patterns: of the files to fetch.
        revision: of a model on the hub, a commit, tag or branch; None takes its main branch.

    Raises:
        UserError: there is no such path, and no such model or revision on the hub, or none that
            this user may have; or a revision of a path.
        MachineError: the hub did not answer, or what it gave cannot be kept.

    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise UserError(
                f"--revision {revision!r} is of a model on the hub, and MODEL {model!r} is here"
            )
        if path.is_dir():
            return Location(path, None)
        if path.suffix != ".gguf":
            raise UserError(f"MODEL {model!r} is neither a directory nor a .gguf file")
        return Location(path.parent, path.name)
    if path.suffix == ".gguf":
        raise UserError(f"MODEL {model!r} does not exist")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"MODEL {model!r} does not exist and is no hub id such as owner/name")
    try:
        fetched = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(hub_patterns),
            ignore_patterns=HUB_IGNORED,
        )
    except Exception as error:
        # Everything is caught: it raises what the network, its back ends and the disk raise.
        why = " ".join((getattr(error, "server_message", None) or str(error)).split())
        at = "" if revision is None else f" at --revision {revision!r}"
        raise (UserError if _is_refusal(error) else MachineError)(
            f"MODEL {model!r}{at} is no directory here and the hub did not give it: {why}"
        ) from error
    directory = Path(fetched)
    return Location(directory, None, directory.name if COMMIT.fullmatch(directory.name) else None)


def locate_all(models: Sequence[str], revision: str | None) -> list[Location]:
    """Find several models; a revision is of the one among them that is on the hub.

    Raises:
        UserError: as for `locate`, or a revision and not exactly one model that is not here.
        MachineError: as for `locate`.

    """
    if revision is None:
        return [locate(model) for model in models]
    distant = [model for model in models if not Path(model).expanduser().exists()]
    if len(distant) != 1:
        raise UserError(
            f"--revision {revision!r} is of one model on the hub, and {len(distant)} of "
            f"{', '.join(map(repr, models))} are not here"
        )
    return [locate(model, revision=revision if model in distant else None) for model in models]


def _is_refusal(error: Exception) -> bool:
    """Say whether the hub has answered, and will answer the same the next time."""
    answers = [found for found in (error, error.__cause__) if isinstance(found, HfHubHTTPError)]
    codes = [found.response.status_code for found in answers]
    return isinstance(error, HFValidationError) or any(
        400 <= code < 500 and code not in TRY_AGAIN for code in codes
    )


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
        except (UserError, MachineError):
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
