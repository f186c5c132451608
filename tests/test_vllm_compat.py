"""What is made up for in older versions of vLLM."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from sliceserve.server.vllm_compat import answer_faults_of_requests


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
