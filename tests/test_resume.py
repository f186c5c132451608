"""Runs that end early and go on: the result must be that of a run that did not."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from sliceserve.slicing import parts
from sliceserve.slicing.cli import main
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.parts import part_path
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.weights import write_tensors

SURVEYED: dict[str, Any] = {"fraction": 0.3, "samples": 24, "sequence_length": 64}
PARTS = 5  # the embedding, three layers, the head
SMALL: dict[str, Any] = {"fraction": 0.3, "samples": 100, "sequence_length": 64} | PAPER


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    output = tiny.with_name("uninterrupted")
    run_slice(SliceOptions(str(tiny), output, **SMALL), show_progress=False)
    return contents(output)


@pytest.mark.parametrize("last", range(PARTS))
@pytest.mark.parametrize("noted", [False, True])
def test_a_run_that_ends_after_any_part_goes_on(
    last: int,
    noted: bool,
    tiny: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends after a part is written, before or after the state has moved on."""
    finish_part = Progress.finish_part

    def end(self: Progress, part: Any, *state: Any) -> None:
        if len(self.part_bytes) == last and not noted:
            part.result()
            raise KeyboardInterrupt
        finish_part(self, part, *state)
        if len(self.part_bytes) == last + 1:
            raise KeyboardInterrupt

    options = SliceOptions(str(tiny), tmp_path / "out", resume=True, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_part", end)
        with pytest.raises(KeyboardInterrupt):
            run_slice(options, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    run_slice(options, show_progress=False)
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STOPS = """
import os, signal, sys
from sliceserve.slicing.cli import main
from sliceserve.slicing.progress import Progress

finish_part = Progress.finish_part

def finish_and_stop(*arguments):
    finish_part(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)

Progress.finish_part = finish_and_stop
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    arguments = ["slice", str(tiny), "--output", str(tmp_path / "out"), "--fraction", "0.3",
                 "--samples", "100", "--sequence-length", "64"]  # fmt: skip
    arguments += [f"--{name}={value}" for name, value in PAPER.items()]
    command = [sys.executable, "-c", STOPS, *arguments]
    state = tmp_path / ".out.partial/unfinished/state.json"
    with subprocess.Popen(command) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert state.exists()
        process.kill()
    assert not (tmp_path / "out").exists()
    assert process.returncode == -signal.SIGKILL
    for number, size in enumerate(json.loads(state.read_text())["part_bytes"]):
        tensors = load_file(part_path(state.parent, number)).values()
        assert sum(tensor.nbytes for tensor in tensors) == size, "a part noted must be whole"
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def unfinished(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SliceOptions:
    """The options of a run that ended after its first part."""
    finish_part = Progress.finish_part

    def end(self: Progress, *arguments: Any) -> None:
        finish_part(self, *arguments)
        raise KeyboardInterrupt

    options = SliceOptions(str(tiny), tmp_path / "out", resume=True, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_part", end)
        with pytest.raises(KeyboardInterrupt):
            run_slice(options, show_progress=False)
    return options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 99}, "options.samples was 100 and is 99"),
        ({"fraction": 0.2, "seed": 1}, "options.fraction was 0.3 and is 0.2; options.seed was 0"),
    ],
)
def test_other_options_are_refused(
    change: dict[str, Any], message: str, unfinished: SliceOptions
) -> None:
    options = SliceOptions(**vars_of(unfinished) | change)
    with pytest.raises(UserError, match=message):
        run_slice(options, show_progress=False)


def test_another_source_is_refused(unfinished: SliceOptions) -> None:
    weights = Path(unfinished.model) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=r"source files\.model\.safetensors was"):
        run_slice(unfinished, show_progress=False)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def restarted(unfinished: SliceOptions, **change: Any) -> SliceOptions:
    return SliceOptions(**vars_of(unfinished) | {"resume": False, "restart": True} | change)


@pytest.mark.parametrize("noted", ["state.json", "job.json"])
def test_a_restart_begins_anew_what_had_other_inputs(
    noted: str,
    unfinished: SliceOptions,
    expected: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The state tells its job, and before the first state the job is noted by itself."""
    path = unfinished.output.with_name(".out.partial") / "unfinished" / noted
    text = path.read_text()
    assert '"seed": 0' in text
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"options\.seed was 1 and is 0"):
        run_slice(unfinished, show_progress=False)
    run_slice(restarted(unfinished), show_progress=False)
    (said,) = [line for line in caplog.messages if "begins it anew" in line]
    assert "options.seed was 1 and is 0" in said
    assert contents(unfinished.output) == expected
    assert [path.name for path in unfinished.output.parent.iterdir()] == ["out"]


def test_a_restart_begins_anew_with_a_new_copy_of_the_model(
    unfinished: SliceOptions, expected: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    weights = Path(unfinished.model) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    run_slice(restarted(unfinished), show_progress=False)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "source files.model.safetensors was" in caplog.text
    assert contents(unfinished.output) == expected


def test_a_restart_goes_on_with_the_same_inputs(
    unfinished: SliceOptions,
    expected: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish_part, finished = Progress.finish_part, []

    def count(self: Progress, *arguments: Any) -> None:
        finish_part(self, *arguments)
        finished.append(len(self.part_bytes))

    monkeypatch.setattr(Progress, "finish_part", count)
    run_slice(restarted(unfinished), show_progress=False)
    assert finished == [2, 3, 4, 5]
    assert "begins it anew" not in caplog.text
    assert contents(unfinished.output) == expected


def test_a_restart_leaves_what_another_run_is_writing(unfinished: SliceOptions) -> None:
    partial = unfinished.output.with_name(".out.partial")
    before = sorted(partial.rglob("*"))
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(MachineError, match="another run is writing"):
        run_slice(restarted(unfinished, seed=1), show_progress=False)
    os.close(descriptor)
    assert sorted(partial.rglob("*")) == before


def test_the_command_line_restarts(
    unfinished: SliceOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["slice", unfinished.model, "--output", str(unfinished.output)]
    arguments += ["--fraction=0.25", "--samples=8", "--sequence-length=32", "--device=cpu"]
    arguments += [f"--{name}={value}" for name, value in PAPER.items()]
    assert main([*arguments, "--resume"]) == 2
    capsys.readouterr()
    assert main([*arguments, "--restart"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "begins it anew" in line]
    assert len(said) == 1
    assert "options.fraction was 0.3 and is 0.25" in said[0]


def test_unfinished_work_is_not_written_over(unfinished: SliceOptions) -> None:
    options = SliceOptions(**vars_of(unfinished) | {"resume": False})
    with pytest.raises(UserError, match="is left of an unfinished run: go on with --resume"):
        run_slice(options, show_progress=False)
    run_slice(unfinished, show_progress=False)


def test_an_interrupt_waits_for_the_part_being_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What writes behind must not put a file into the directory while that is removed."""
    interrupted, written = threading.Event(), []

    def write_late(path: Path, tensors: dict[str, Tensor]) -> None:
        assert interrupted.wait(timeout=60)
        time.sleep(0.5)
        write_tensors(path, tensors)
        written.append(path.name)

    def interrupt(*_arguments: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "write_tensors", write_late)
    monkeypatch.setattr(Progress, "finish_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_slice(SliceOptions(str(tiny), tmp_path / "out", **SMALL), show_progress=False)
    assert written == ["part-00000.tmp"]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_resume_does_not_spoil_what_an_older_version_began(
    unfinished: SliceOptions,
) -> None:
    """Which did not note its job at the start."""
    (unfinished.output.with_name(".out.partial") / "unfinished" / "job.json").unlink()
    with pytest.raises(UserError, match=r"options\.seed was"):
        run_slice(SliceOptions(**vars_of(unfinished) | {"seed": 7}), show_progress=False)
    run_slice(unfinished, show_progress=False)


def test_two_runs_do_not_write_one_output(unfinished: SliceOptions) -> None:
    descriptor = os.open(unfinished.output.with_name(".out.partial"), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(MachineError, match="another run is writing"):
        run_slice(unfinished, show_progress=False)
    os.close(descriptor)


def test_a_memory_limit_that_is_too_small_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["slice", str(tiny), "--output", str(tmp_path / "out"), "--samples", "4",
                 "--sequence-length", "32", "--memory-limit"]  # fmt: skip
    assert main([*arguments, "20MB"]) == 2
    assert "--memory-limit 0.02 GB is too small for this model" in capsys.readouterr().err
    assert main([*arguments, "a lot"]) == 2
    assert "'a lot' is not a size such as 24GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_is_too_small_is_no_mistake_of_the_users(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sliceserve.slicing.memory.available_bytes", lambda: 0)
    arguments = ["slice", str(tiny), "--output", str(tmp_path / "out"), "--samples", "4"]
    assert main([*arguments, "--sequence-length", "32"]) == 1
    assert "error: the memory left here of " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


STEPS = 3 + 1 + 3 + 5  # of a survey: forward, head, backward; then the parts


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A tiny model with a tied head, and the files of a run with every step there is."""
    work = tmp_path_factory.mktemp("surveyed")
    dense = save_tiny(work / "dense", tiny_config(tie_word_embeddings=True), torch.float32)
    options = SliceOptions(str(dense), work / "out", **SURVEYED)
    run_slice(options, show_progress=False)
    return dense, contents(work / "out")


@pytest.mark.parametrize("last", [1, 3, 4, 5, 7, 8, 10, STEPS])
def test_a_survey_that_ends_after_any_step_goes_on(
    last: int,
    surveyed: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, files = surveyed
    finish_part, steps = Progress.finish_part, 0

    def end(self: Progress, *arguments: Any) -> None:
        nonlocal steps
        finish_part(self, *arguments)
        steps += 1
        if steps == last:
            raise KeyboardInterrupt

    options = SliceOptions(str(dense), tmp_path / "out", resume=True, **SURVEYED)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_part", end)
        with pytest.raises(KeyboardInterrupt):
            run_slice(options, show_progress=False)
    run_slice(options, show_progress=False)
    assert contents(tmp_path / "out") == files


def vars_of(options: SliceOptions) -> dict[str, Any]:
    return dict(vars(options))
