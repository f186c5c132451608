"""The errors a user can cause."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError


class UserError(Exception):
    """A mistake in what the user gave; its message is one sentence naming the argument and value.

    The command line prints it and exits with code 2; nothing half written is left behind.
    """


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

    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read: {reason(error)}") from error
