"""Text to windows of tokens, for calibration and for perplexity."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sliceserve.slicing.errors import UserError

DATA = Path(__file__).with_name("data")
SHIPPED = {"wikitext2-excerpt": DATA / "wikitext2-train-excerpt.txt"}
HELD_OUT = DATA / "wikitext2-test-excerpt.txt"


@dataclass(frozen=True)
class Text:
    """A text, the name the user gave it, and its SHA-256 (hex)."""

    name: str
    content: str
    sha256: str


def read_text(name: str, argument: str) -> Text:
    """Read a text that ships with the package by name, or a UTF-8 file by path.

    Args:
        name: what the user gave.
        argument: the option it was given to, for the error.

    Raises:
        UserError: no such name or file, or not UTF-8.

    """
    path = SHIPPED.get(name, Path(name).expanduser())
    if not path.is_file():
        known = ", ".join(SHIPPED)
        raise UserError(f"{argument} {name!r} is no file and none of the shipped texts ({known})")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{argument} {name!r} is not UTF-8 text: {error}") from error
    return Text(name, content, hashlib.sha256(raw).hexdigest())


def token_windows(text: Text, tokenizer: Any, sequence_length: int) -> Tensor:
    """Cut a text, as one stream of tokens without BOS, into consecutive windows; no overlap.

    Returns:
        Token ids [windows, sequence_length]; the rest of the stream, if shorter, is left out.

    """
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // sequence_length
    return torch.tensor(ids[: count * sequence_length]).reshape(count, sequence_length)


def pick_windows(text: Text, windows: Tensor, samples: int, seed: int, argument: str) -> Tensor:
    """Choose `samples` windows at random by `seed`, in the order of the text.

    Raises:
        UserError: fewer windows than samples; says how many fit.

    """
    fit, length = windows.shape
    if fit < samples:
        raise UserError(
            f"{argument} {text.name!r} is too short for --samples {samples} of "
            f"--sequence-length {length}: {fit} fit"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(fit, generator=generator)[:samples].sort().values
    return windows[chosen]
