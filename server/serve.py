"""``sliceserve serve``: serve a sliced checkpoint over HTTP with vLLM."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

from sliceserve.server import vllm_compat
from sliceserve.server.adapters import check_adapter
from sliceserve.server.protocol import HEAD_BYTES, HEADERS
from sliceserve.server.settings import (
    add_options,
    as_json,
    check_file_keys,
    take_settings,
)
from sliceserve.slicing.checkpoint import read_checkpoint_summary
from sliceserve.slicing.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from types import FrameType

    from sliceserve.server.settings import ServerSettings

_DESCRIPTION = """\
Serve the sliced checkpoint in the directory DIR with vLLM over an OpenAI-compatible HTTP API:
/v1/models, /v1/completions, /v1/chat/completions, /metrics, /livez and /readyz. Every option of
`vllm serve` can follow DIR. The model is named after the directory unless --served-model-name
is given. Without an API key the server listens on 127.0.0.1 only.
"""

_EPILOG = """\
For all options:          sliceserve serve --help=all
For a section:            sliceserve serve --help=ModelConfig    (case-insensitive)
For one option:           sliceserve serve --help=max-model-len  (_ or - accepted)
"""


_USE_VLLM = "run `vllm serve DIR` for that"
# vLLM's methods of speculation that read tokens alone, and that of the user's own class.
_TOKEN_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")


def main(argv: list[str]) -> int:
    """Run the server; returns its exit code. Raises UserError for what the user can mend."""
    if not vllm_compat.is_installed():
        raise UserError("serve: vLLM is not installed; install sliceserve[cuda] or sliceserve[cpu]")
    vllm_compat.prepare_environment()
    parser = make_parser()
    args, settings = parse_arguments(parser, argv)
    if vars(args).pop("print_config"):
        print(as_json(settings, args, parser.get_default))
        return 0
    summary = read_checkpoint_summary(Path(args.model))
    for module in args.lora_modules or ():
        check_adapter(module.name, Path(module.path), Path(args.model))
    with _user_errors():
        vllm_compat.configure_logging(args)
        vllm_compat.validate_serve_args(args)

    # These need vLLM, whose absence is reported above.
    import uvloop

    from sliceserve.server.access_log import OFF, open_access_log
    from sliceserve.server.app import access_of, serve
    from sliceserve.server.listener import check_tls

    access = access_of(settings, args)
    refuse_limits_without_keys(settings, keyed=bool(access.keys))
    bound_answers(args, settings.max_output_tokens)
    log = open_access_log(settings.access_log)
    args.disable_uvicorn_access_log |= settings.access_log != OFF
    confine(args, keyed=bool(access.keys), insecure=settings.insecure)
    check_tls(args)
    address, bound = _bind(args)
    with contextlib.closing(bound):
        vllm_config = _engine_config(args)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        served = serve(vllm_config, args, settings, summary, access, log, address, bound)
        return int(uvloop.run(served))


def make_parser() -> Any:
    """Return the parser of vLLM's options and ours."""
    parser = vllm_compat.make_serve_parser(
        prog="sliceserve serve",
        usage="sliceserve serve DIR [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_options(parser)
    parser.set_defaults(allowed_origins=[])  # older versions let every origin in
    parser.set_defaults(h11_max_incomplete_event_size=HEAD_BYTES, h11_max_header_count=HEADERS)
    return parser


def parse_arguments(parser: Any, argv: list[str]) -> tuple[argparse.Namespace, ServerSettings]:
    """Parse DIR and vLLM's options, with the model and its name filled in, and our settings."""
    # vLLM looks for the file's name in an argument of its own only.
    argv = [
        part
        for text in argv
        for part in (text.split("=", 1) if text.startswith("--config=") else [text])
    ]
    flag_arguments = argv
    if "--config" in argv[:-1]:
        at = argv.index("--config")
        check_file_keys(parser, Path(argv[at + 1]))
        flag_arguments = argv[:at] + argv[at + 2 :]
    with _user_errors(OSError):  # a file given with --config
        args: argparse.Namespace = parser.parse_args(argv)
    settings = take_settings(args, parser.parse_args(flag_arguments))
    if args.model_tag is None:
        parser.error("the following arguments are required: DIR")
    if args.model != parser.get_default("model"):
        raise UserError(f"--model {args.model}: give the checkpoint as the argument DIR only")
    _refuse_unsupported(args)
    args.model = args.model_tag
    if not args.served_model_name:
        args.served_model_name = [Path(args.model).resolve().name]
    return args, settings


def confine(args: argparse.Namespace, *, keyed: bool, insecure: bool) -> None:
    """Let only this machine reach a server without keys, unless told otherwise.

    Raises:
        UserError: --host is an address that other machines reach.

    """
    if keyed or insecure or args.uds:
        return
    if args.host is None:
        args.host = "127.0.0.1"
    elif not _is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: other machines reach this address and there is no API key; "
            "give --api-key-file or SLICESERVE_API_KEY, or --insecure to serve everyone"
        )


def refuse_limits_without_keys(settings: ServerSettings, *, keyed: bool) -> None:
    """Refuse limits a key where there are no keys.

    Raises:
        UserError: there are such limits.

    """
    limits = settings.limits_of_keys
    if limits and not keyed:
        name, value = next(iter(limits.items()))
        raise UserError(
            f"--{name.replace('_', '-')} {value}: there is no API key; give --api-key-file or "
            "SLICESERVE_API_KEY"
        )


def bound_answers(args: argparse.Namespace, tokens: int | None) -> None:
    """Make vLLM end answers after so many tokens, those of requests that name no number too."""
    if tokens is not None:
        given = args.override_generation_config or {}
        args.override_generation_config = given | {"max_new_tokens": tokens}


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if args.api_server_count not in (None, 1):
        raise UserError(
            f"--api-server-count {args.api_server_count}: only one API server is supported; "
            f"{_USE_VLLM}"
        )
    if args.headless:
        raise UserError(f"--headless: engines without a server are not supported; {_USE_VLLM}")
    if args.data_parallel_multi_port_external_lb:
        raise UserError(
            f"--data-parallel-multi-port-external-lb: only one API server is supported; {_USE_VLLM}"
        )
    if args.grpc:
        raise UserError(f"--grpc: only HTTP is supported; {_USE_VLLM}")
    if args.enable_prompt_embeds:
        raise UserError(
            "--enable-prompt-embeds: the embeddings of a sliced model have another width than "
            "those of the model it was sliced from; send text or token ids"
        )
    _refuse_heads((args.speculative_config or {}).get("method"))


def _refuse_heads(method: str | None) -> None:
    """Refuse what drafts tokens from the residual stream of a dense model."""
    if method is not None and method not in _TOKEN_DRAFTERS:
        raise UserError(
            f"--speculative-config, method {method!r}: its heads read the residual stream of the "
            "dense model, which a sliced one has not; draft with 'ngram' or a 'draft_model'"
        )


def _bind(args: argparse.Namespace) -> tuple[str, socket.socket]:
    """Bind the server's socket before the long start of the engine."""
    option = f"--uds {args.uds}" if args.uds else f"--port {args.port}"
    try:
        with _user_errors(KeyError):
            address, bound = vllm_compat.setup_server(args)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{option}: the address is already in use") from error
        raise UserError(f"{option}: cannot listen there: {error.strerror}") from error
    if not args.uds and args.port == 0:
        args.port = bound.getsockname()[1]
        address = f"{address.removesuffix(':0')}:{args.port}"
    return address, bound


def _engine_config(args: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    with _user_errors(OSError):
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if config.speculative_config is not None:
        _refuse_heads(config.speculative_config.method)  # which vLLM may have found out itself
    return config


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """End the start of the server; once it serves, vLLM's own handlers stop it cleanly."""
    # Not a KeyboardInterrupt: vLLM's wait for its engine swallows that and starts all the same.
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _user_errors(*others: type[Exception]) -> Iterator[None]:
    """Turn vLLM's complaints about option values into a UserError of one sentence."""
    from vllm.exceptions import VLLMValidationError  # no ValueError in newer versions

    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, VLLMValidationError, *others)
    try:
        yield
    except kinds as error:
        raise UserError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            message = f"--{str(first['loc'][0]).replace('_', '-')}: {message}"
    else:
        # str() of a KeyError is the message's repr().
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    message = " ".join(message.split()).removeprefix("Error: ")
    message = re.split(r"(?<=[.!?])\s(?=[A-Z])", message, maxsplit=1)[0]
    return message.rstrip(".")
