"""What clients send: the openai client in its many ways, what nobody would send, and too much.

The latter is made by Schemathesis from the server's description; `FUZZ_EXAMPLES` says how much for
an operation.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import told_engine
from hypothesis import HealthCheck, given, settings
from jsonschema import validate
from schemathesis import GenerationMode
from server_process import (
    STOP_SECONDS,
    ServerProcess,
    ends_with_its_engine,
    serving,
    stopped,
)
from shapes import byte_tokenizer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

KEY = "fuzz"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
NOT_IMPLEMENTED = 501


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file lets the engine run out of memory."""
    return told_engine.installed(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def server(
    tiny_sliced: Path, memory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("fuzz") / "log"
    template = log.with_name("template")
    template.write_text("{{ messages[0]['content'] }}")
    options = ["--chat-template", str(template), "--request-timeout", "60"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--middleware", "told_engine.EchoSockets", "--max-body-size", str(LARGEST)]
    environment = {"SLICESERVE_API_KEY": KEY, "PYTHONPATH": str(memory)}
    with serving(tiny_sliced, log, *options, **environment) as server:
        server.wait_for("/readyz", 200)
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


ASKED: dict[str, Any] = {"model": "sliced", "messages": [{"role": "user", "content": "Pick one."}]}
SAID, ANSWERED = "what-the-client-said", "what-the-model-answered"
LOGPROBS = 20  # vLLM's default of --max-logprobs
DONE = "data: [DONE]"
LARGEST = 100_000  # bytes of a body or a message
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"enum": [1, 22, 333]}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pick", "schema": SCHEMA}}
    answer = client.chat.completions.create(**ASKED, response_format=form, max_tokens=200)
    validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


NAMED: Any = {"type": "function", "function": {"name": "pick"}}


TOOL: dict[str, Any] = {
    "tools": [
        {"type": "function", "function": {"name": "pick", "parameters": SCHEMA, "strict": True}}
    ],
    "parallel_tool_calls": False,
    "max_tokens": 300,
    "seed": 1,
    # Between the parts of JSON a random model would write nothing but white space.
    "logit_bias": dict.fromkeys(byte_tokenizer().encode(" \t\n\r"), -100),
}


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_the_arguments_of_a_strict_tool_follow_its_schema(
    client: openai.OpenAI, choice: Any
) -> None:
    answer = client.chat.completions.create(**ASKED, **TOOL, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.name == "pick"
    validate(json.loads(call.function.arguments), SCHEMA)


def test_a_stream_of_a_strict_tool_adds_up_to_arguments_of_its_schema(
    client: openai.OpenAI,
) -> None:
    parts = client.chat.completions.create(**ASKED, **TOOL, tool_choice=NAMED, stream=True)
    calls = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
    told = [call.function for call in calls if call.function]
    assert "".join(function.name or "" for function in told) == "pick"
    validate(json.loads("".join(function.arguments or "" for function in told)), SCHEMA)


def test_a_stream_adds_up_to_the_answer_in_one_piece(client: openai.OpenAI) -> None:
    asked = ASKED | {"max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    parts = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20


def test_a_client_that_gives_up_can_ask_again(client: openai.OpenAI, server: ServerProcess) -> None:
    asked: dict[str, Any] = {"model": "sliced", "prompt": "hi", "max_tokens": 5}
    with stopped(server.engine()), pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**asked)
    assert client.completions.create(**asked).usage


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_messages_without_a_message_are_the_requests_fault(
    server: ServerProcess, path: str
) -> None:
    body = {"model": "sliced", "max_tokens": 1, "messages": []}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert "empty" in answer.json()["error"]["message"]


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_no_request_breaks_the_server(server: ServerProcess, mode: GenerationMode) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    answers: Counter[int] = Counter()
    for found in description.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing could be wrong

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                # Else most would end with: there is no such model.
                case.body["model"] = "sliced"
            answer = case.call(headers=headers, timeout=120)
            answers[answer.status_code] += 1
            told = (case.operation.label, answer.status_code, answer.text)
            assert answer.status_code < 500 or answer.status_code == NOT_IMPLEMENTED, told
            assert "Traceback" not in answer.text, told
            if answer.status_code >= 400:
                assert answer.json().get("error", {}).get("message"), told

        ask()
    print(dict(answers))
    # Most that are valid are answered, and most that are not are refused.
    assert answers[200 if mode is GenerationMode.POSITIVE else 400] > EXAMPLES
    ready = server.wait_for("/readyz", 200, 503)
    assert ready.status_code == 200, ready.text


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("completions", {"prompt": "hi", "logprobs": LOGPROBS}),
        ("completions", {"prompt": "hi", "prompt_logprobs": LOGPROBS}),
        ("chat/completions", {"logprobs": True, "top_logprobs": LOGPROBS} | ASKED),
        ("chat/completions", {"prompt_logprobs": LOGPROBS} | ASKED),
    ],
)
def test_logprobs_are_bounded(server: ServerProcess, route: str, asked: dict[str, Any]) -> None:
    url, headers = f"{server.url}/v1/{route}", {"Authorization": f"Bearer {KEY}"}
    body = {"model": "sliced", "max_tokens": 2}
    assert httpx.post(url, json=body | asked, headers=headers, timeout=60).status_code == 200
    (name,) = (name for name, value in asked.items() if value == LOGPROBS)
    refused = httpx.post(url, json=body | asked | {name: LOGPROBS + 1}, headers=headers, timeout=60)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == name
    assert error["message"] == f"{name} is {LOGPROBS + 1}, and {LOGPROBS} logprobs are allowed."


@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_engine_refuses_late_is_told_alike_on_all_routes(
    server: ServerProcess, streamed: bool
) -> None:
    told = []
    for route, asked in (("chat/completions", ASKED), ("responses", {"input": "hi"})):
        answer = httpx.post(
            f"{server.url}/v1/{route}",
            json={"model": "sliced", "logit_bias": {"9999999": 1}, "stream": streamed} | asked,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        assert answer.status_code == (200 if streamed else 400), answer.text
        *_, error = (part for part in answer.text.split("\n\n") if part not in ("", DONE))
        told.append(json.loads(error.removeprefix("data: "))["error"])
    assert told[0] == told[1]
    assert (told[0]["code"], told[0]["type"]) == (400, "BadRequestError")
    assert told[0]["param"] == "logit_bias"


def test_the_openai_client_raises_what_ends_a_stream(client: openai.OpenAI) -> None:
    events = client.responses.create(
        model="sliced", input="hi", stream=True, extra_body={"logit_bias": {"9999999": 1}}
    )
    with pytest.raises(openai.APIError, match="out-of-vocab") as caught:
        list(events)
    assert caught.value.code == "400"


def test_so_it_is_in_a_stream_of_messages(server: ServerProcess) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(["}}}
    told = []
    for streamed in (False, True):
        answer = httpx.post(
            f"{server.url}/v1/messages",
            json={
                "model": "sliced", "messages": MESSAGES, "max_tokens": 5, "stream": streamed,
                "output_config": {"format": {"type": "json_schema", "schema": schema}},
            },
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )  # fmt: skip
        assert answer.status_code == (200 if streamed else 400), answer.text
        event = json.loads(answer.text.strip().removeprefix("event: error\ndata: "))
        told.append((event["type"], event["error"]["type"], event["error"]["message"]))
    assert told[0] == told[1]
    series = httpx.get(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ).text
    assert 'route="/v1/messages",status="500"' not in series


def test_a_websockets_message_is_bounded_as_a_body_is(server: ServerProcess) -> None:
    url, headers = server.url.replace("http", "ws", 1), {"Authorization": f"Bearer {KEY}"}
    for compressed in ("deflate", None):
        with connect(
            url, additional_headers=headers, compression=compressed, proxy=None, max_size=None
        ) as socket:
            largest = "x" * LARGEST
            socket.send(largest)
            assert socket.recv() == largest
            socket.send(largest + "x")
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv()
        assert caught.value.rcvd
        assert caught.value.rcvd.code == 1009


# What is answered, and what is refused by our layers, by vLLM's reading of it, and by its engine.
MESSAGES = [{"role": "user", "content": SAID}]
TOLD: list[tuple[str, int, dict[str, Any]]] = [
    ("completions", 200, {"prompt": SAID}),
    ("completions", 200, {"prompt": SAID, "stream": True, "echo": True}),
    ("chat/completions", 200, {"messages": MESSAGES}),
    ("responses", 200, {"input": SAID}),
    ("messages", 200, {"messages": MESSAGES, "max_tokens": 5}),
    ("completions", 400, {"prompt": SAID * 100}),
    ("completions", 400, {"prompt": SAID, "n": 1000}),
    ("completions", 400, {"prompt": SAID, "max_tokens": "many"}),
    ("completions", 404, {"prompt": SAID, "model": "other"}),
]


def test_no_text_of_prompts_and_answers_is_logged(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    """In all that the server writes to its streams, its access log included, and in its series."""
    headers = {"Authorization": f"Bearer {KEY}"}
    for route, status, asked in TOLD:
        answer = httpx.post(
            f"{server.url}/v1/{route}",
            json={"model": "sliced"} | asked,
            headers=headers,
            timeout=60,
        )
        assert answer.status_code == status, (asked, answer.text)
        assert status == 200 or SAID not in answer.text, (asked, answer.text)
    broken = f'{{"prompt": "{SAID}'
    refused = httpx.post(
        f"{server.url}/v1/completions", content=broken, headers=headers, timeout=60
    )
    assert refused.status_code == 400
    assert SAID not in refused.text
    # This error names the message that is wrong, to the client that has sent it.
    part = {"type": "of no kind", "text": SAID}
    for change in ({"role": 3}, {"content": [part]}):
        wrong: Any = [MESSAGES[0] | change]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="sliced", messages=wrong)
    form: Any = {"structured_outputs": {"choice": [ANSWERED]}}
    chosen = client.chat.completions.create(**ASKED, extra_body=form)
    assert chosen.choices[0].message.content == ANSWERED
    log = server.log.read_text()
    assert '"route": "/v1/chat/completions"' in log
    series = httpx.get(f"{server.url}/metrics", headers=headers, timeout=60).text
    assert "sliceserve_http_responses_total" in series
    for text in (log, series):
        assert SAID not in text
        assert ANSWERED not in text


def test_an_engine_out_of_memory_ends_streams_and_the_server(
    server: ServerProcess, memory: Path
) -> None:
    def fail(engine: int) -> None:
        for told in ("step", "hold"):
            (memory / told).touch()
        os.kill(engine, signal.SIGCONT)
        deadline = time.monotonic() + STOP_SECONDS
        while not (memory / "held").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        probe.request("GET", "/livez")  # before the end, as the server may be gone soon after it
        (memory / "hold").unlink()

    with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as probe:
        ends_with_its_engine(server, KEY, fail)
        assert probe.getresponse().status == 503
    assert told_engine.MESSAGE in server.log.read_text()
