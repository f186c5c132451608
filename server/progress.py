"""How much of the weights is loaded, told by the processes that load them to the one that serves.

Each of them appends to a file of its own in a directory that an environment variable names, a
byte for every hundredth. Where it cannot, on another machine for instance, nothing is known.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# Not one of the server's settings, whose names begin with its prefix.
DIRECTORY = "_SLICESERVE_PROGRESS"
STEPS = 100


@contextmanager
def shared_progress() -> Iterator[Callable[[], float | None]]:
    """Let the processes that start within the block report; yields what reads their reports."""
    with tempfile.TemporaryDirectory(prefix="sliceserve-", ignore_cleanup_errors=True) as directory:
        os.environ[DIRECTORY] = directory
        try:
            yield lambda: slowest(Path(directory))
        finally:
            del os.environ[DIRECTORY]


def slowest(directory: Path) -> float | None:
    """Return the share of the weights that the slowest process has loaded; None before any."""
    try:
        return min((file.stat().st_size / STEPS for file in directory.iterdir()), default=None)
    except OSError:  # the directory is gone
        return None


def reporting(
    weights: Iterable[tuple[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    environment: Mapping[str, str] = os.environ,
) -> Iterator[tuple[str, Any]]:
    """Pass the weights on and report, as each next one is asked for, what has been loaded.

    Args:
        weights: names and tensors.
        shapes: of all the tensors there will be.
        environment: names the directory, if anybody wants to know.

    """
    report = _open(environment.get(DIRECTORY))
    try:
        total, loaded, told = sum(map(prod, shapes.values())), 0, 0
        for name, tensor in weights:
            yield name, tensor
            loaded += prod(shapes.get(name, (0,)))
            if report is not None:
                reached = STEPS * loaded // total
                with suppress(OSError):  # a full disk must not end the loading
                    told += os.write(report, b"." * (reached - told))
    finally:
        if report is not None:
            os.close(report)


def _open(directory: str | None) -> int | None:
    if directory is None:
        return None
    try:
        return tempfile.mkstemp(dir=directory)[0]
    except OSError:
        return None
