"""What is made up for in versions of vLLM."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.exceptions import VLLMValidationError

from sliceserve.server.vllm_compat import answer_faults_of_requests, tell_errors_of_streams


def handler_that(error: Exception | None) -> Any:
    async def create_messages(request: str, raw_request: Any) -> str:
        if error is not None:
            raise error
        return f"{request} {raw_request}"

    handler = SimpleNamespace(create_messages=create_messages)
    answer_faults_of_requests(handler, "create_messages")
    return handler


@pytest.mark.parametrize("error", [ValueError("no message"), VLLMValidationError("no message")])
def test_a_request_at_fault_is_answered(error: Exception) -> None:
    answer = asyncio.run(handler_that(error).create_messages("a", "b"))
    assert answer.error.code == 400
    assert "no message" in answer.error.message


def test_what_else_fails_and_what_does_not_stay_as_they_are() -> None:
    assert asyncio.run(handler_that(None).create_messages("a", "b")) == "a b"
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(handler_that(RuntimeError("broken")).create_messages("a", "b"))


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    fields = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(fields | {'choices': [choice]})}\n\n"


def messages(*chunks: str) -> tuple[list[str], list[str]]:
    """What vLLM makes of a chat completion's stream for the Messages API, and with us around it."""

    async def stream() -> AsyncIterator[str]:
        for one in (*chunks, "data: [DONE]\n\n"):
            yield one

    async def events(handler: Any) -> list[str]:
        return [event async for event in handler.message_stream_converter(stream())]

    plain: Any = AnthropicServingMessages.__new__(AnthropicServingMessages)
    told: Any = AnthropicServingMessages.__new__(AnthropicServingMessages)
    tell_errors_of_streams(told)
    return asyncio.run(events(plain)), asyncio.run(events(told))


def test_a_stream_of_messages_ends_with_the_error_itself() -> None:
    begun = [chunk({"role": "assistant", "content": ""}), chunk({"content": "hi"})]
    error = {"message": "no such token", "type": "BadRequestError", "param": "p", "code": 400}
    for before in ([], begun):
        _, told = messages(*before, f"data: {json.dumps({'error': error})}\n\n")
        assert sum("event: message_start" in event for event in told) == bool(before)
        name, data = told[-1].strip().split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: ")) == {
            "type": "error",
            "error": {"type": "BadRequestError", "message": "no such token", "code": 400},
        }


def test_a_stream_of_messages_without_an_error_is_vllms() -> None:
    plain, told = messages(
        chunk({"role": "assistant", "content": ""}), chunk({"content": "hi"}), chunk({}, "stop")
    )
    assert plain == told
    assert plain[-1].startswith("event: message_stop")
