"""The server's own settings: flags, then the environment, then the file of ``--config``.

vLLM's options are typed by vLLM; these are the ones it lacks, and the keys.
"""

from __future__ import annotations

import json
import os
import re
from argparse import SUPPRESS, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from sliceserve.server.masking import masked
from sliceserve.slicing.errors import UserError, reading

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

ENV_PREFIX = "SLICESERVE_"
# Kubernetes sets these in every pod beside a Service whose name starts with "sliceserve".
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
_KEY_LIMITS = ("key_max_requests", "key_requests_per_minute", "key_tokens_per_minute")
_NOT_SHOWN = ("config", "model_tag")


class ServerSettings(BaseSettings):
    """What `sliceserve serve` adds to vLLM's options; every field is a flag but `api_key`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys that clients may present, separated by commas or newlines."
    )
    api_key_file: Path | None = Field(
        None, description="File with a key a line, read again whenever it changes."
    )
    insecure: bool = Field(
        False, description="Serve without a key on an address that other machines reach."
    )
    metrics_public: bool = Field(False, description="Leave /metrics open to those without a key.")
    access_log: str = Field(
        "stdout",
        min_length=1,
        description="Where a line of JSON a request goes: stdout, stderr, off, or a file.",
    )
    start_timeout: float = Field(
        3600.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds of the start after which the server ends with 1; 0 for no bound.",
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running requests have to finish after SIGTERM or SIGINT.",
    )
    probe_timeout: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without an answer after which /livez calls the engine hung.",
    )
    hang_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without an answer of the engine after which the server ends with 1.",
    )

    max_requests: int = Field(
        1024, gt=0, description="Requests at a time, running and waiting; more get 429."
    )
    max_queued_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens of the prompts that wait for their first token; more get 429.",
    )
    max_body_size: int = Field(
        4 * 2**20,
        gt=0,
        description="Bytes of a request's body, or a WebSocket's message; a larger one gets 413.",
    )
    body_timeout: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request's body may take to arrive; a slower one gets 408.",
    )
    request_timeout: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request may take, its answer included; a slower one gets 408.",
    )
    max_sequences: int = Field(
        256, gt=0, description="Prompts times n that a request may ask for; more get 400."
    )
    max_output_tokens: int | None = Field(
        None, gt=0, description="Tokens of an answer; a request that asks for more gets 400."
    )
    max_stops: int = Field(
        16, gt=0, description="Stop strings, or tokens, of a request; one with more gets 400."
    )
    key_max_requests: int | None = Field(
        None, gt=0, description="Requests of one key at a time; more get 429."
    )
    key_requests_per_minute: int | None = Field(
        None, gt=0, description="Requests of one key in a minute; more get 429."
    )
    key_tokens_per_minute: int | None = Field(
        None, gt=0, description="Tokens of one key in a minute; further requests get 429."
    )

    @property
    def limits_of_keys(self) -> dict[str, int]:
        """The limits that each key has, by the names of their settings."""
        return {name: getattr(self, name) for name in _KEY_LIMITS if getattr(self, name)}

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """Accept one string of keys, or a list of such strings."""
        texts = [value] if isinstance(value, str) else value
        keys = [key.strip() for text in texts for key in re.split(r"[,\n]", text)]
        return tuple(key for key in keys if key)


def add_options(parser: Any) -> None:
    """Add the settings' flags to vLLM's parser; those not given leave no trace in its result."""
    group = parser.add_argument_group("sliceserve", "What sliceserve adds to vLLM's server.")
    group.add_argument(
        "--print-config", action="store_true", help="Print the settings as JSON and end."
    )
    for name, field in ServerSettings.model_fields.items():
        if name == "api_key":  # vLLM's own flag
            continue
        described = f"{field.description} Default: {field.default}."
        kind: dict[str, Any] = (
            {"action": BooleanOptionalAction} if field.annotation is bool else {"metavar": "VALUE"}
        )
        group.add_argument(_flag(name), default=SUPPRESS, help=described, **kind)


def check_file_keys(parser: Any, file: Path) -> None:
    """Refuse a file of ``--config`` with keys that are no option.

    vLLM's parser drops unknown keys whose value is false or an empty list.

    Raises:
        UserError: such a key, or no mapping at all.

    """
    with reading(f"--config {str(file)!r}"):
        content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"--config {str(file)!r}: it is not a mapping of options to values")
    options = {option for action in parser._actions for option in action.option_strings}
    for key in content:
        if f"--{str(key).split('.')[0].replace('_', '-')}" not in options:
            raise UserError(f"--config {str(file)!r}: there is no option {str(key)!r}")


def take_settings(flags_and_file: argparse.Namespace, flags: argparse.Namespace) -> ServerSettings:
    """Move the settings out of vLLM's parsed options and complete them from the environment.

    The keys leave the environment too: vLLM and the processes it starts have no use for them.

    Args:
        flags_and_file: the options as parsed with the file of ``--config``; our settings and the
            keys, which vLLM must not check as well, are removed from it.
        flags: the options as parsed without that file.

    Raises:
        UserError: an unknown variable, or a value that its setting cannot take.

    """
    for name in os.environ:
        # As they are read: in capitals or not.
        setting = name.lower().removeprefix(ENV_PREFIX.lower())
        if (
            name.upper().startswith(ENV_PREFIX)
            and setting not in ServerSettings.model_fields
            and not _SERVICE_LINK.fullmatch(name)
        ):
            raise UserError(f"{name}: there is no such setting; see `sliceserve serve --help`")
    given = _given(flags)
    from_file = {name: value for name, value in _given(flags_and_file).items() if name not in given}
    if key := os.environ.pop("VLLM_API_KEY", None):
        from_file.setdefault("api_key", key)
    from_environment = EnvSettingsSource(ServerSettings)()
    for name in [name for name in os.environ if name.upper() == f"{ENV_PREFIX}API_KEY"]:
        del os.environ[name]
    for name in ServerSettings.model_fields:
        if hasattr(flags_and_file, name):
            delattr(flags_and_file, name)
    flags_and_file.api_key = None
    merged = from_file | from_environment | given
    try:
        return ServerSettings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        by_environment = name in from_environment and name not in given
        place = f"{ENV_PREFIX}{name.upper()}" if by_environment else _flag(name)
        value = "" if name == "api_key" else f" {merged[name]!r}"
        raise UserError(f"{place}{value}: {first['msg'].lower()}") from None


def as_json(
    settings: ServerSettings, args: argparse.Namespace, default: Callable[[str], Any]
) -> str:
    """Return our settings and the vLLM options that are not at their default, secrets masked."""
    shown: dict[str, Any] = settings.model_dump(mode="json")
    for name, value in sorted(vars(args).items()):
        if name not in (*_NOT_SHOWN, *shown) and value != default(name):
            shown[name] = masked(value, name)
    return json.dumps(
        {name.replace("_", "-"): value for name, value in shown.items()}, indent=2, default=str
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(namespace: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(namespace, name, None) for name in ServerSettings.model_fields}
    return {name: value for name, value in values.items() if value is not None}
