"""One server with keys, for all tests of one: `conftest.py` has its fixtures."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import told_engine
from server_process import ServerProcess, serving

KEY, OTHER_KEY, FIXED_KEY = "key-of-alice", "key-of-bob", "key-from-environment"
QUEUED_TOKENS = 400


@pytest.fixture(scope="session")
def guarded_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n")
    return file


@pytest.fixture(scope="session")
def guarded_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files tell the engine what to do: not to end its start, at first."""
    directory = told_engine.installed(tmp_path_factory.mktemp("engine"))
    (directory / "hold").touch()
    return directory


@pytest.fixture(scope="session")
def guarded_start(
    tiny_sliced: Path,
    guarded_keys: Path,
    guarded_engine: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """A server that nobody has waited for, and that loads the model until it is let."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    template = log.with_name("template.jinja")
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}\n")
    options = ["--probe-timeout", "5", "--drain-timeout", "100", "--metrics-public"]
    options += ["--max-sequences", "4", "--max-output-tokens", "500", "--key-max-requests", "5"]
    options += ["--max-queued-tokens", str(QUEUED_TOKENS), "--max-logprobs", "5"]
    options += ["--body-timeout", "5"]
    # As the status page leaves the temperature to the server.
    options += ["--override-generation-config", '{"temperature": 0}']
    with serving(
        tiny_sliced,
        log,
        *(*options, "--api-key-file", str(guarded_keys), "--chat-template", str(template)),
        SLICESERVE_API_KEY=f"{FIXED_KEY},another",
        PYTHONPATH=str(guarded_engine),
    ) as server:
        yield server


@pytest.fixture(scope="session")
def guarded(guarded_start: ServerProcess, guarded_engine: Path) -> ServerProcess:
    """The server that serves; the tests of its end, in `test_guarded_server.py`, end it."""
    (guarded_engine / "hold").unlink()
    guarded_start.wait_for("/readyz", 200)
    return guarded_start


def get(server: ServerProcess, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=30)


def keys_in(text: str) -> list[str]:
    """Those that clients have shown, the wrong ones too."""
    return [key for key in (KEY, OTHER_KEY, FIXED_KEY, "guessed") if key in text]
