"""What the values of arguments may be; argparse names a failed one by its function.

All raise ValueError or argparse.ArgumentTypeError on a value that will not do.
"""

import argparse
import re


def fraction(text: str) -> float:
    """Read a share in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def number(text: str) -> int:
    """Read a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text: str) -> float:
    """Read a share in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def rank(text: str) -> int | str:
    """Read a rank, or "auto"."""
    return text if text == "auto" else rank_number(text)


def rank_number(text: str) -> int:
    """Read a whole number from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def rate(text: str) -> float:
    """Read a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def size(text: str) -> int:
    """Read bytes, such as 24GB or 512MiB."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"([0-9.]+) *([a-z]*)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GB or 512MiB")
    return int(float(match[1]) * units[match[2].upper()])


def memory(text: str) -> int:
    """Read bytes of memory, which have a unit."""
    value = size(text)
    if text.strip()[-1:].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} has no unit, as {text.strip()}GiB has")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory")
    return value


def names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [name for part in text.split(",") if (name := part.strip())]


def window(text: str) -> int:
    """Read the tokens of a window, from 2 up."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2, and a window must predict")
    return value


rank_number.__name__ = "number"
window.__name__ = "number"
names.__name__ = "list"
