"""Where vLLM 0.24 to 0.32 keep the parts of their API server.

The server's modules moved from ``vllm.entrypoints.openai`` to ``vllm.entrypoints.launchers``
between these versions. Every function is looked up in its newest home first, because a release
may leave a deprecated re-export in the old one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
from http import HTTPStatus
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sliceserve.server.masking import mask_logs

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import AsyncIterator

    from fastapi import FastAPI
    from starlette.datastructures import State

_logger = logging.getLogger("vllm.sliceserve.vllm_compat")

# Where vLLM makes a prompt of a request; what fails there is no fault of the server's.
READING = (
    "vllm.renderers",
    "vllm.entrypoints.chat_utils",
    "vllm.entrypoints.openai.responses.utils",
)
_ERROR_CHUNK = 'data: {"error"'
_HOMES = {
    "build_app": ("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
    "create_error_response": (
        "vllm.entrypoints.serve.exception_handling.error_response",
        "vllm.entrypoints.serve.utils.error_response",
    ),
    "get_uvicorn_log_config": (
        "vllm.entrypoints.launchers.utils.server_utils",
        "vllm.entrypoints.serve.utils.server_utils",
    ),
    "init_app_state": (
        "vllm.entrypoints.launchers.api_server.app_state",
        "vllm.entrypoints.openai.api_server",
    ),
    "make_arg_parser": (
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
    "setup_server": (
        "vllm.entrypoints.launchers.launcher",
        "vllm.entrypoints.openai.api_server",
    ),
    "validate_parsed_serve_args": (
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    ),
}


def _module_exists(module: str) -> bool:
    parts = module.split(".")
    return all(find_spec(".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _load(name: str) -> Any:
    for home in filter(_module_exists, _HOMES[name]):
        module = importlib.import_module(home)
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"this vLLM has no {name} in any of {', '.join(_HOMES[name])}")


def is_installed() -> bool:
    """Whether a vLLM package can be imported."""
    return _module_exists("vllm")


def prepare_environment() -> None:
    """Set the environment variables that vLLM's own command line sets."""
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()


def make_serve_parser(*, prog: str, usage: str, description: str, epilog: str) -> Any:
    """Return vLLM's parser of all options of its ``serve`` command."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog=prog, usage=usage, description=description)
    parser = _load("make_arg_parser")(parser)
    parser.epilog = epilog
    return parser


def configure_logging(args: argparse.Namespace) -> None:
    """Apply the logging options, in the versions that have them."""
    import vllm.logger

    if hasattr(vllm.logger, "configure_logging_from_args"):
        vllm.logger.configure_logging_from_args(args)


def validate_serve_args(args: argparse.Namespace) -> None:
    """Check the parsed options as ``vllm serve`` does; raises ValueError or TypeError."""
    _load("validate_parsed_serve_args")(args)


def setup_server(args: argparse.Namespace) -> tuple[str, socket.socket]:
    """Check the front end's options and bind its socket; returns the address and the socket.

    vLLM logs the options meanwhile: secrets in them are masked.
    """
    mask_logs()
    function = _load("setup_server")
    # The parameter exists, and is required, only in newer versions.
    options = (
        {"reuse_port": False} if "reuse_port" in inspect.signature(function).parameters else {}
    )
    address: str
    bound: socket.socket
    address, bound = function(args, **options)
    return address, bound


def uvicorn_log_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the log configuration for uvicorn, or None for uvicorn's own."""
    config: dict[str, Any] | None = _load("get_uvicorn_log_config")(args)
    return config


def error_of(error: Exception) -> Any:
    """Return what vLLM's routes answer to an error: its `message`, `type`, `param` and `code`."""
    return _load("create_error_response")(error).error


def build_app(args: argparse.Namespace, supported_tasks: Any, model_config: Any) -> FastAPI:
    """Return vLLM's application with the routes that the tasks need."""
    app: FastAPI = _load("build_app")(args, supported_tasks, model_config)
    return app


async def init_app_state(
    engine_client: Any, state: State, args: argparse.Namespace, supported_tasks: Any
) -> None:
    """Give the application's routes their engine."""
    await _load("init_app_state")(engine_client, state, args, supported_tasks)
    router = importlib.import_module("vllm.entrypoints.anthropic.api_router")
    if state.anthropic_serving_messages:
        tell_errors_of_streams(state.anthropic_serving_messages)
        if not hasattr(router, "create_error_response"):
            for name in ("create_messages", "count_tokens"):
                answer_faults_of_requests(state.anthropic_serving_messages, name)


def answer_faults_of_requests(handler: Any, name: str) -> None:
    """Have a method of a handler return vLLM's error for a request at fault, and not raise it.

    Routes of the Messages API in vLLM 0.24 answer 500 whatever is raised; later ones ask the same
    function what to answer.

    Args:
        handler: what answers requests.
        name: of the method.

    """
    create_error_response, method = _load("create_error_response"), getattr(handler, name)

    @functools.wraps(method)
    async def answered(*request: Any) -> Any:
        try:
            return await method(*request)
        except Exception as error:
            answer = create_error_response(error)
            if answer.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            _logger.warning("A request to the Messages API failed.", exc_info=True)
            return answer

    setattr(handler, name, answered)


def tell_errors_of_streams(handler: Any) -> None:
    """Have the Messages API's streams end with the error that their chat completion ends with.

    vLLM takes that for a chunk, and tells the client of an internal error: that it is none.

    Args:
        handler: vLLM's ``AnthropicServingMessages``.

    """
    convert = handler.message_stream_converter

    @functools.wraps(convert)
    async def converted(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        errors: list[dict[str, Any]] = []

        async def without_errors() -> AsyncIterator[str]:
            async for chunk in chunks:
                if chunk.startswith(_ERROR_CHUNK):
                    errors.append(json.loads(chunk.removeprefix("data: "))["error"])
                elif not errors:
                    yield chunk

        async for event in convert(without_errors()):
            yield event
        for found in errors:
            # The code is for our own counts, as the type is OpenAI's in whole answers too.
            error = {name: found[name] for name in ("type", "message", "code")}
            yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"

    handler.message_stream_converter = converted
