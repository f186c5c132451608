"""The errors that end a command with one sentence: the user's, and those of machine and network."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from pydantic import ValidationError

# What the system says of a path that was given; anything else it says may be otherwise next time.
OF_A_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
NO_MEMORY = ("out of memory", "can't allocate memory")  # what PyTorch's RuntimeErrors say


class UserError(Exception):
    """A mistake in what the user gave; its message is one sentence naming the argument and value.

    The command line prints it and exits with code 2; nothing half written is left behind.
    """

    exit_code = 2


class MachineError(Exception):
    """What the machine or the network has failed in; its message is one sentence.

    The same command may go well later. The command line prints it and exits with code 1; nothing
    half written is left behind.
    """

    exit_code = 1


Kind: TypeAlias = type[UserError] | type[MachineError]


def fault(error: Exception, unnumbered: Kind = UserError) -> Kind:
    """Return what to raise for an error of a library or of the system.

    Args:
        error: the error.
        unnumbered: what it is if it is an OSError without the system's number.

    """
    if isinstance(error, OSError):
        if error.errno is None:
            return unnumbered
        return UserError if error.errno in OF_A_PATH else MachineError
    return MachineError if is_out_of_memory(error) else UserError


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that there is no memory left, of the host or a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    )


def reason(error: BaseException) -> str:
    """Return the first line of an error's message; libraries follow it with pages of advice."""
    text = str(error)
    if isinstance(error, ValidationError):
        # Its own first line says only how many fields are wrong.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        text = first["msg"].removeprefix("Value error, ")
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library's parser raises on a damaged file into one sentence about it.

    Everything is caught: on bad bytes the parsers of GGUF, tokenizers and configs raise nearly any
    exception there is, the bare class included.

    Raises:
        UserError: the block raised.
        MachineError: it raised what is no fault of the file: an input/output error, no memory.

    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:
        raise fault(error)(f"{what} cannot be read: {reason(error)}") from error
