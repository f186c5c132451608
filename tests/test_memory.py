"""What a container's limit leaves, read from files as the kernel writes them."""

import math
from pathlib import Path

import pytest

from sliceserve.slicing.memory import AVAILABLE_SHARE, available_bytes, container_bytes

GB = 10**9


def written(directory: Path, version: int, limit: str, used: int, cache: int) -> Path:
    """The files of a control group."""
    if version == 2:
        files = {"memory.max": limit, "memory.current": str(used)}
        files["memory.stat"] = f"anon 1\nfile 9\ninactive_file {cache}\nactive_file 3"
    else:
        files = {"limit_in_bytes": limit, "usage_in_bytes": str(used)}
        files = {f"memory/memory.{name}": text for name, text in files.items()}
        # The group's own, and with those below it.
        stat = f"cache 9\ninactive_file 0\ntotal_inactive_file {cache}"
        files["memory/memory.stat"] = stat
    (directory / "memory").mkdir()
    for name, text in files.items():
        (directory / name).write_text(f"{text}\n")
    return directory


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_leaves_what_is_not_in_use(version: int, tmp_path: Path) -> None:
    """Files read once, which the kernel may drop, are not in use."""
    group = written(tmp_path, version, str(32 * GB), 20 * GB, 5 * GB)
    assert container_bytes(group) == 17 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_the_smaller_of_host_and_limit_counts(version: int, tmp_path: Path) -> None:
    group = written(tmp_path, version, "1000000", 300000, 0)
    assert available_bytes(group) == int(AVAILABLE_SHARE * 700000)


def test_more_in_use_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    assert container_bytes(written(tmp_path, 2, "1000", 1200, 0)) == 0


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == math.inf
    assert container_bytes(written(tmp_path, 2, "max", 300000, 0)) == math.inf
    assert available_bytes(tmp_path) > GB // 100
