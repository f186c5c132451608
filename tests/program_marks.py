"""What pytest does with tests that `programs.needs` marks; conftest.py has it."""

import pytest
from programs import require

__all__ = ["pytest_configure", "pytest_runtest_setup"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "program(path, missing): needs it, or says what is missing")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("program"):
        require(*mark.args)
