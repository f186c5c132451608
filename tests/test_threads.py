"""Threads within a container's limit, read from files as the kernel writes them."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sliceserve.slicing import cli, threads
from sliceserve.slicing.threads import container_cpus, limit_threads


def written(directory: Path, version: int, quota: str) -> Path:
    """The files of a control group whose period is a tenth of a second."""
    (directory / "cpu").mkdir()
    if version == 2:
        (directory / "cpu.max").write_text(f"{quota} 100000\n")
    else:
        (directory / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (directory / "cpu/cpu.cfs_period_us").write_text("100000\n")
    return directory


@pytest.mark.parametrize(("version", "none"), [(1, "-1"), (2, "max")])
def test_a_part_of_a_cpu_counts_as_one(version: int, none: str, tmp_path: Path) -> None:
    assert container_cpus(tmp_path) == math.inf
    for name, quota, cpus in (
        ("a", "400000", 4), ("b", "250000", 3), ("c", "5000", 1), ("d", none, math.inf),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        assert container_cpus(written(tmp_path / name, version, quota)) == cpus


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("quota", "expected"), [("150000", 2), ("max", 3), ("6400000", 3)])
def test_no_more_threads_than_cpus(quota: str, expected: int, tmp_path: Path) -> None:
    limit_threads(written(tmp_path, 2, quota))
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    "command",
    [
        ["slice", "none", "--output", "new", "--fraction", "0.25"],
        ["perplexity", "none", "--text", "none"],
        ["evaluate", "none", "--tasks", "none"],
        ["finetune", "none", "--output", "new"],
        ["quantize", "none", "--output", "new", "--scheme", "fp8"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_computes_heeds_the_limit(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    group = written(tmp_path, 2, "200000")
    monkeypatch.setattr(threads, "limit_threads", lambda: limit_threads(group))
    assert cli.main(command) == 2
    assert torch.get_num_threads() == 2
