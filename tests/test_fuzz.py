"""Thousands of requests that nobody would send, made by Schemathesis from the server's description.

`FUZZ_EXAMPLES` says how many an operation; more than the default take their time.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from server_process import ServerProcess, serving

KEY = "fuzz"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
NOT_IMPLEMENTED = 501


@pytest.fixture(scope="module")
def server(tiny_sliced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("fuzz") / "log"
    template = log.with_name("template")
    template.write_text("{{ messages[0]['content'] }}")
    options = ("--chat-template", str(template), "--request-timeout", "20")
    with serving(tiny_sliced, log, *options, SLICESERVE_API_KEY=KEY) as server:
        server.wait_for("/readyz", 200)
        yield server


def test_no_request_breaks_the_server(server: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    answers: Counter[int] = Counter()
    for found in description.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                # Else most would end with: there is no such model.
                case.body["model"] = "sliced"
            answer = case.call(headers=headers, timeout=60)
            answers[answer.status_code] += 1
            told = (case.operation.label, answer.status_code, answer.text)
            assert answer.status_code < 500 or answer.status_code == NOT_IMPLEMENTED, told
            assert "Traceback" not in answer.text, told
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], told

        ask()
    print(dict(answers))
    assert answers[200] > EXAMPLES
    assert server.wait_for("/readyz", 200, 503).status_code == 200
