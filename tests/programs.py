"""Programs that come with no Python package, and the tests that need them."""

import os

import pytest


def needs(program: str | None, missing: str) -> pytest.MarkDecorator:
    """Mark tests that need a program; what to say where there is none."""
    return pytest.mark.program(program, missing)


def require(program: str | None, missing: str) -> str:
    """Skip a test whose program is missing; where `CI=true`, which installs them all, fail it."""
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return program
