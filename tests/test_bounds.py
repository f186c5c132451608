"""What one request may ask for, and what each key may take."""

import asyncio
import json
import time
from typing import Any

import pytest
from asgi_application import Application, client_of, error_of
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from sliceserve.server.arguments import Arguments
from sliceserve.server.auth import Auth, KeyRing
from sliceserve.server.bounds import BAD_WORDS, STOP_CHARACTERS, Bounds, find_excess
from sliceserve.server.exchange import Exchange, Refusal, Watch
from sliceserve.server.forms import (
    EXPRESSION_CHARACTERS,
    FORM_CHARACTERS,
    PROPERTIES,
    TOOLS_CHARACTERS,
    compiled_form,
)
from sliceserve.server.per_key import KeyLimits, PerKey

BOUNDS = Bounds(sequences=6, output_tokens=100, stops=2, logprobs=5, vocabulary=257)
HALF = {"type": "string", "pattern": "x" * (EXPRESSION_CHARACTERS // 2)}
FITTING = {"type": "object", "properties": {"a": HALF, "b": HALF}}
NAMES = [str(number) for number in range(PROPERTIES + 1)]
MANY = {str(number): True for number in range(PROPERTIES // 4)}
TEXTS = {"enum": ["x" * 99] * (FORM_CHARACTERS * 2 // 3 // 100)}
LONG = {"type": "object", "properties": {"a": HALF, "b": HALF, "c": {"pattern": "x"}}}


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"n": 6, "max_tokens": 100, "stop": ["a", "b"]}, None),
        ({"prompt": [1] * 50, "stop": "x" * STOP_CHARACTERS}, None),
        ({"n": None, "max_tokens": None, "stop": None, "prompt": None}, None),
        ({"n": [], "max_tokens": "many", "stop": 3, "prompt": {"a": 1}}, None),
        ({"max_tokens": float("nan"), "n": float("-inf")}, None),
        ({"messages": [{"role": "user", "content": "hi"}] * 50}, None),
        ({"n": 7}, "n"),
        ({"n": "7"}, "n"),
        ({"n": 7.0}, "n"),
        ({"n": 10**400}, "n"),
        ({"prompt": ["hi"] * 7}, "prompt"),
        ({"prompt": [[1, 2]] * 3, "n": 3}, "prompt"),
        ({"messages": [[{"role": "user", "content": "hi"}]] * 7}, "messages"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": "101"}, "max_completion_tokens"),
        ({"max_output_tokens": 1e30}, "max_output_tokens"),
        ({"logprobs": 5, "prompt_logprobs": None, "sampling_params": {"logprobs": 5}}, None),
        ({"logprobs": True, "top_logprobs": 5}, None),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": "6"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"sampling_params": {"logprobs": 6}}, "logprobs"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "x" * (STOP_CHARACTERS + 1)}, "stop"),
        ({"stop": [1, "x" * (STOP_CHARACTERS + 1)]}, "stop"),
        ({"stop_token_ids": [1, 2]}, None),
        ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids"),
        ({"sampling_params": {"stop_token_ids": [1, 2, 3]}}, "stop_token_ids"),
        ({"sampling_params": {"n": 7}}, "n"),
        ({"sampling_params": {"max_tokens": 101}}, "max_tokens"),
        ({"sampling_params": [1]}, None),
        ({"items": ["a"] * 7}, "items"),
        ({"items": [[1]] * 6}, None),
        ({"stop_sequences": ["a", "b", "c"]}, "stop_sequences"),
        ({"response_format": {"json_schema": {"schema": FITTING}}}, None),
        ({"response_format": {"json_schema": {"schema": LONG}}}, "response_format"),
        ({"text": {"format": {"schema": LONG}}}, "text"),
        ({"tools": [{"function": {"parameters": LONG}}]}, "tools"),
        (
            {"structured_outputs": {"regex": "x" * (EXPRESSION_CHARACTERS + 1)}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"json": json.dumps(LONG)}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": json.dumps(LONG)}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, None),
        ({"response_format": {"patternProperties": {"x" * 20_000: {}}}}, "response_format"),
        ({"tools": [{"function": {"parameters": {"properties": {"pattern": {}}}}}]}, None),
        ({"stop_token_ids": [0, 256]}, None),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"stop_token_ids": ["1000000"]}, "stop_token_ids"),
        ({"sampling_params": {"stop_token_ids": [-1]}}, "stop_token_ids"),
        ({"bad_words": ["a"] * BAD_WORDS}, None),
        ({"bad_words": ["a"] * (BAD_WORDS + 1)}, "bad_words"),
        ({"sampling_params": {"bad_words": ["a" * (STOP_CHARACTERS + 1)]}}, "bad_words"),
        ({"sampling_params": {"max_tokens": None}}, "max_tokens"),
        ({"top_k": 2**63 - 1}, None),
        ({"top_k": -(2**70)}, "top_k"),
        ({"stop": "\ud800"}, "stop"),
        ({"bad_words": ["a", "\udfff"]}, "bad_words"),
        ({"stop": "\U0001f600"}, None),
        ({"background": False, "store": "false"}, None),
        ({"background": True, "store": "false"}, "background"),
        ({"background": "Yes"}, "background"),
        ({"features": {}, "prompt": "x"}, None),
        ({"features": None, "sampling_params": {}}, None),
        ({"features": {}, "sampling_params": {}}, "features"),
        ({"vllm_xargs": {"a": 1, "kv_transfer_params": {}}}, None),
        ({"vllm_xargs": [], "sampling_params": {"extra_args": None}}, None),
        ({"sampling_params": {"extra_args": {"kv_transfer_params": None}}}, None),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
        ({"sampling_params": {"extra_args": {"kv_transfer_params": [1]}}}, "extra_args"),
        ({"background": 1}, "background"),
        ({"structured_outputs": {"choice": ["four"] * (FORM_CHARACTERS // 5)}}, None),
        ({"structured_outputs": {"choice": ["four"] * FORM_CHARACTERS}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "x" * FORM_CHARACTERS + "x"}}, "structured_outputs"),
        ({"text": {"format": {"schema": {"enum": [1] * (FORM_CHARACTERS + 1)}}}}, "text"),
        ({"tools": [{"function": {"description": "x" * FORM_CHARACTERS}}]}, None),
        ({"tools": [{"function": {"description": "x" * TOOLS_CHARACTERS}}]}, None),
        ({"tools": [{"function": {"default": "x" * TOOLS_CHARACTERS}}]}, "tools"),
        ({"response_format": {"properties": dict.fromkeys(NAMES[:-1], True)}}, None),
        ({"response_format": {"properties": dict.fromkeys(NAMES, True)}}, "response_format"),
        ({"tools": [{"parameters": {"properties": MANY}}] * 16}, None),
        ({"tools": [{"parameters": {"properties": MANY}}] * 17}, "tools"),
        ({"response_format": {"prefixItems": [{}] * FORM_CHARACTERS}}, "response_format"),
        ({"response_format": {"enum": [[]] * FORM_CHARACTERS}}, "response_format"),
        ({"structured_outputs": {"json": json.dumps(TEXTS)}}, None),
        ({"structured_outputs": {"whitespace_pattern": "x" * 20_000}}, "structured_outputs"),
        ({"tools": [{"title": {"x" * TOOLS_CHARACTERS: 1}}]}, "tools"),
    ],
)
def test_what_asks_too_much_is_named(given: dict[str, Any], argument: str | None) -> None:
    excess = find_excess(given, BOUNDS)
    assert (excess and excess.argument) == argument


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text"),
        ({"tools": [{}], "tool_choice": "required"}, "tools"),
        ({"tools": [{}], "tool_choice": {"type": "any"}}, "tools"),
        ({"tools": [{}], "tool_choice": "auto"}, None),
        ({"tools": [{}]}, None),
        ({"response_format": None, "structured_outputs": {}}, None),
        ({"response_format": {"type": "text"}, "text": {"format": {"type": "text"}}}, None),
        ({"text": {"verbosity": "low"}}, None),
    ],
)
def test_a_form_is_known_by_what_the_engine_compiles(
    given: dict[str, Any], argument: str | None
) -> None:
    assert compiled_form(given) == argument


def test_without_a_bound_answers_may_be_of_any_length() -> None:
    assert find_excess({"max_tokens": 10**9, "logprobs": 10**9}, Bounds(1, None, 1)) is None


def test_a_request_that_asks_too_much_does_not_reach_the_engine() -> None:
    async def scenario() -> None:
        application = Application()
        async with client_of(Arguments(application.app, BOUNDS)) as client:
            refused = await client.post("/answer", json={"model": "m", "n": 50})
            assert error_of(refused, 400)["param"] == "n"
            assert "50 sequences, and 6 are allowed" in error_of(refused, 400)["message"]
            assert application.reached == 0
            assert (await client.post("/answer", json={"n": 6})).json() == {"model": "m"}

    asyncio.run(scenario())


def limited(application: Application, limits: KeyLimits) -> tuple[Watch, list[Exchange]]:
    reported: list[Exchange] = []
    keys = KeyRing(["a", "b"])
    app = Auth(PerKey(application.app, limits), keys, frozenset())
    return Watch(app, frozenset(), reported.append), reported


def test_each_key_has_its_requests_at_a_time() -> None:
    async def scenario() -> None:
        application = Application()
        app, _ = limited(application, KeyLimits(2, None, None))
        async with client_of(app) as first, client_of(app, "b") as second:
            running = [asyncio.ensure_future(first.post("/wait")) for _ in range(2)]
            while application.reached < 2:
                await asyncio.sleep(0)
            refused = await first.post("/answer")
            assert "2 requests at work" in error_of(refused, 429)["message"]
            assert int(refused.headers["retry-after"]) == 1
            assert (await first.get("/answer")).status_code == 200
            assert (await second.post("/answer")).status_code == 200
            application.going.set()
            await asyncio.gather(*running)
            assert (await first.post("/answer")).status_code == 200

    asyncio.run(scenario())


def test_each_key_has_its_requests_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        application = Application()
        app, _ = limited(application, KeyLimits(None, 3, None))
        async with client_of(app) as first, client_of(app, "b") as second:
            answers = [await first.post("/answer") for _ in range(5)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
            assert "3 requests a minute" in error_of(answers[4], 429)["message"]
            assert 50 < int(answers[4].headers["retry-after"]) <= 60
            assert (await second.post("/answer")).status_code == 200
            began = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: began + 61)
            assert (await first.post("/answer")).status_code == 200

    asyncio.run(scenario())


def test_each_key_has_its_tokens_a_minute() -> None:
    async def scenario() -> None:
        application = Application()
        app, reported = limited(application, KeyLimits(None, None, 100))
        async with client_of(app) as first, client_of(app, "b") as second:
            answers = [await first.post("/answer?tokens=40") for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
            assert "100 tokens a minute" in error_of(answers[3], 429)["message"]
            assert [exchange.tokens for exchange in reported] == [40, 40, 40, 1]
            assert reported[3].refused is Refusal.KEY_TOKENS
            assert (await second.post("/answer?tokens=40")).status_code == 200

    asyncio.run(scenario())


def test_a_websocket_is_a_request_of_its_key() -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    routed = Starlette(routes=[WebSocketRoute("/v1/realtime", echo)])
    app = Auth(PerKey(routed, KeyLimits(2, 4, None)), KeyRing(["a", "b"]), frozenset())
    client = TestClient(Watch(app, frozenset()))

    def opened(key: str) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return client.websocket_connect("/v1/realtime", headers=headers)

    def refused(words: str) -> None:
        with pytest.raises(WebSocketDenialResponse) as caught, opened("a"):
            pass
        assert words in error_of(caught.value, 429)["message"]
        assert int(caught.value.headers["retry-after"]) > 0

    with opened("a") as first, opened("a"):
        refused("2 requests at work")
        with opened("b") as other:
            other.send_text("hi")
            assert other.receive_text() == "hi"
        first.send_text("there")
        assert first.receive_text() == "there"
    with opened("a"), opened("a"):
        pass
    refused("4 requests a minute")


def test_a_stream_that_is_left_costs_a_token_a_chunk() -> None:
    assert Exchange("1", "POST", 0.0, disconnected=True, chunks=7).tokens == 7
    known = Exchange("1", "POST", 0.0, prompt_tokens=3, generation_tokens=4, chunks=6)
    assert known.tokens == 7
