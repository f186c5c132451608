"""What an unfinished run leaves on disk, so that it can go on after anything, SIGKILL included.

After every part (the embedding, each layer, the head) the state moves on in one rename: parts
written, signals and basis at the place reached. Whatever was under way is done again.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sliceserve.slicing.errors import UserError
from sliceserve.slicing.signals import Signals, load_signals, save_signals
from sliceserve.slicing.source import read_json_object
from sliceserve.slicing.weights import write_tensors

STATE = "state.json"
UNFINISHED = "unfinished"  # the directory of all this, in that of the output

logger = logging.getLogger(__name__)


class Progress:
    """The state of one run, in a directory of its own beside the shards.

    Attributes:
        directory: holds the state, the parts and spilled signals.
        part_bytes: of each finished part.

    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        """Start, or go on with what the directory holds.

        Args:
            directory: made if it is not there.
            job: what determines the result, as plain JSON.

        Raises:
            UserError: the directory holds the state of another job; names what differs.

        """
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.part_bytes: list[int] = []
        self._job = json.loads(json.dumps(job))
        self._windows: list[list[int]] = []
        if (directory / STATE).exists():
            state = read_json_object(directory / STATE)
            _compare(state["job"], self._job, directory.parent)
            self.part_bytes, self._windows = state["part_bytes"], state["windows"]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors kept at the place reached."""
        return load_file(self._path("tensors.safetensors"))

    def restore_signals(
        self, signals: Sequence[Signals], dtype: torch.dtype, batch_sizes: Sequence[int]
    ) -> None:
        """Fill the signals with those at the place reached.

        Args:
            signals: the stores to fill.
            dtype: of the signals.
            batch_sizes: windows of each batch; may be other ones than when they were saved.

        """
        for number, store in enumerate(signals):
            shapes = [[size, *self._windows[number]] for size in batch_sizes]
            load_signals(store, self._path(f"signals-{number}.bin"), shapes, dtype)

    def finish_part(
        self,
        part: "Future[int]",
        tensors: Mapping[str, Tensor],
        signals: Sequence[Signals] = (),
    ) -> None:
        """Note that a part is done, with the tensors and signals needed to go on from it."""
        before = [self._path(f"signals-{number}.bin") for number in range(len(self._windows))]
        before.append(self._path("tensors.safetensors"))
        self.part_bytes.append(0)
        write_tensors(
            self._path("tensors.safetensors"),
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        )
        for number, store in enumerate(signals):
            save_signals(store, self._path(f"signals-{number}.bin"))
        self._windows = [list(store[0].shape[1:]) for store in signals]
        self.part_bytes[-1] = part.result()
        state = {"job": self._job, "part_bytes": self.part_bytes, "windows": self._windows}
        temporary = self.directory / f"{STATE}.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.directory / STATE)
        for path in before:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{len(self.part_bytes)}-{name}"


def keep_job(path: Path, job: Mapping[str, Any]) -> None:
    """Note what a run is to do, or check that the run that is unfinished was to do the same.

    Args:
        path: the file that says so, in the directory of what is unfinished.
        job: what determines the result, as plain JSON.

    Raises:
        UserError: the run was begun with another job; names what differs.

    """
    if path.exists():
        _compare(read_json_object(path), json.loads(json.dumps(job)), path.parent.parent)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(job))
    temporary.replace(path)


def note_job(directory: Path, job: Mapping[str, Any]) -> None:
    """Note the job of what is unfinished, in its directory, which is made.

    Raises:
        UserError: it was begun with another job, or cannot be read; names what differs.

    """
    _check_all(directory, job)
    directory.mkdir(exist_ok=True)
    keep_job(directory / "job.json", job)


def _check_all(directory: Path, job: Mapping[str, Any]) -> None:
    """Check the job and every state in a directory; each tells its job."""
    for path in sorted(directory.rglob("*.json")):
        noted = read_json_object(path)
        _compare(noted.get("job", noted), json.loads(json.dumps(job)), directory.parent)


def remove_other(directory: Path, job: Mapping[str, Any]) -> None:
    """Remove what is unfinished if it was begun with another job or cannot be read; say so.

    Args:
        directory: of what is unfinished; the job and every state that is in it tell theirs.
        job: what determines the result, as plain JSON.

    """
    try:
        _check_all(directory, job)
    except UserError as error:
        logger.warning("%s; --restart begins it anew", error)
        shutil.rmtree(directory)


def _compare(old: Any, new: Any, directory: Path) -> None:
    differences = list(_differences("", old, new))
    if differences:
        raise UserError(
            f"--resume cannot go on with {str(directory)!r}, begun with other inputs: "
            + "; ".join(differences)
        )


def _differences(where: str, old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{where}.{key}" if where else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{where} was {old!r} and is {new!r}"
