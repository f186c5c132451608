"""A test that lacks a program says so, and is no success where all must be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import require

TEST = """
from programs import needs

@needs(None, "no such thing: get one")
def test_with_it():
    assert None, "it ran"

@needs("/bin/sh", "no shell")
def test_with_a_shell():
    pass
"""


@pytest.mark.parametrize(("variable", "kind"), [("true", "ERROR"), ("", "SKIPPED")])
def test_a_test_without_its_program(variable: str, kind: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "conftest.py").write_text("from program_marks import *\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "--strict-markers", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=os.environ | {"CI": variable, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "it ran" not in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(kind))
    assert "no such thing: get one" in line
    *_, last = done.stdout.splitlines()
    assert "1 passed" in last
    assert f"1 {kind.lower()}" in last
    assert bool(done.returncode) == (kind == "ERROR")


def test_a_program_that_is_there_is_given() -> None:
    assert require(sys.executable, "no Python") == sys.executable
