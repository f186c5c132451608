"""Why the engine did not start, told by the process that failed to the one that serves.

vLLM's own error there says only that another process failed. Where the other one cannot tell, on
another machine for instance, nothing is known.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sliceserve.slicing.errors import MachineError, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sliceserve.slicing.errors import Kind

# Not one of the server's settings, whose names begin with its prefix.
FILE = "_SLICESERVE_FAILURE"
# With these vLLM's workers and engines log, in vLLM 0.24 to 0.32, what ends them before they serve.
_ENDS = ("WorkerProc failed to start", "EngineCore failed to start")
# The word, no part of a path or a name.
_OF_MEMORY = re.compile(r"(?<![\w./-])memory(?![\w/-]|\.\w)", re.IGNORECASE)


@contextmanager
def shared_failure() -> Iterator[Callable[[], str | None]]:
    """Let the processes that start within the block tell; yields what returns the first failure."""
    with tempfile.TemporaryDirectory(prefix="sliceserve-", ignore_cleanup_errors=True) as directory:
        file = Path(directory) / "failure"
        os.environ[FILE] = str(file)
        try:
            yield lambda: _read(file)
        finally:
            del os.environ[FILE]


def tell_failures(logger: logging.Logger, environment: Mapping[str, str] = os.environ) -> None:
    """Tell what this logger of vLLM's says of the end of this process, if anybody wants to know."""
    if FILE in environment:
        logger.addHandler(_Teller(Path(environment[FILE])))


def loading_fault(error: Exception) -> Kind:
    """Return what to raise for an error of vLLM's while it loads a model.

    It says what options or a checkpoint have wrong by ValueErrors, but also that memory is short.
    """
    if isinstance(error, RuntimeError) or _OF_MEMORY.search(str(error)):
        return MachineError
    return fault(error)


class _Teller(logging.Handler):
    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write the error on one line, unless one was written: the first is the cause."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not record.getMessage().startswith(_ENDS):
            return
        text = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(OSError), self._file.open("x") as file:
            file.write(text)


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
