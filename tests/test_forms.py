"""Requests that would end vLLM's engine, or get past our bounds, on a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarded import FIXED_KEY, get
from server_process import ServerProcess, post, sample, serving

COMPLETION = {"model": "sliced", "prompt": "ab", "max_tokens": 2}
# What vLLM tells to be wrong before its engine has it, or not, by its version.
FORMS = [
    {"json": {"type": "object", "patternProperties": {"[": {}}}},
    {"json": {"$ref": "#"}},
    {"choice": ["a\0b"]},
    {"grammar": "root ::= root"},
]


@pytest.fixture(scope="module")
def server(tiny_sliced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One of its own: vLLM logs tracebacks of what is tried here."""
    log = tmp_path_factory.mktemp("forms") / "log"
    with serving(tiny_sliced, log, "--metrics-public", SLICESERVE_API_KEY=FIXED_KEY) as server:
        server.wait_for("/readyz", 200)
        yield server


def asked(server: ServerProcess, path: str, body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {FIXED_KEY}"}
    content = body if isinstance(body, str) else json.dumps(body)
    headers["Content-Type"] = "application/json"
    return httpx.post(f"{server.url}{path}", headers=headers, content=content, timeout=60)


def serves(server: ServerProcess) -> bool:
    return get(server, "/livez").status_code == post(server, FIXED_KEY).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "argument"),
    [
        ("completions", {"min_tokens": 1, "stop_token_ids": [10**6]}, "stop_token_ids"),
        ("completions", {"top_k": 2**70}, "top_k"),
        ("completions", {"stop": "\ud800"}, "stop"),
        ("completions", {"bad_words": ["\ud800"]}, "bad_words"),
        ("completions", {"structured_outputs": {"choice": ["x"] * 10**5}}, "structured_outputs"),
        ("completions", {"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
        ("responses", {"input": "x", "background": True, "store": "false"}, "background"),
    ],
)
def test_what_the_engine_would_not_survive_is_refused(
    server: ServerProcess, path: str, body: dict[str, Any], argument: str
) -> None:
    answer = asked(server, f"/v1/{path}", COMPLETION | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == argument
    assert sample(server, "sliceserve_running_requests") == 0
    assert serves(server)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_does_not_compile_ends_its_request_only(
    server: ServerProcess, form: dict[str, Any]
) -> None:
    # Of several back ends the engine takes the one that is asked for first.
    fitting = asked(
        server, "/v1/completions", COMPLETION | {"structured_outputs": {"choice": ["a", "b"]}}
    )
    assert fitting.json()["choices"][0]["text"] in {"a", "b"}
    answer = asked(server, "/v1/completions", COMPLETION | {"structured_outputs": form})
    # Some versions take the one with a zero byte.
    assert answer.status_code in ({200, 400} if "choice" in form else {400}), answer.text
    assert serves(server)


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_a_body_that_is_nested_too_deep_is_refused(server: ServerProcess, path: str) -> None:
    answer = asked(server, path, "[" * 100_000)
    assert answer.status_code == 400
    assert "nested too deep" in answer.json()["error"]["message"]
