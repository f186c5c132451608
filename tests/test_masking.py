"""What is secret in the options is not in the log: vLLM's own lines of them, before any engine."""

import json
import logging
from typing import Any

import pytest
from vllm.config import ObservabilityConfig
from vllm.logger import init_logger

from sliceserve.server.masking import MASK, mask_logs, masked
from sliceserve.server.serve import make_parser, parse_arguments
from sliceserve.server.vllm_compat import setup_server

ENDPOINT = "https://user:hidden@collector.example:4317/a?project=b&api_key=hidden"
SHOWN = f"https://{MASK}@collector.example:4317/a?project=b&api_key={MASK}"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of vLLM, whose logger may keep them from the others."""
    found: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: found.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    caplog.set_level(logging.INFO, "vllm")
    return found


def test_the_log_of_the_start_has_the_options_without_secrets(lines: list[str]) -> None:
    connector = {"auth": "hidden", "apiKey": "hidden", "hosts": [ENDPOINT]}
    transfer = {"kv_connector": "a", "kv_role": "kv_both", "kv_connector_extra_config": connector}
    options = ["--hf-token", "hidden", "--otlp-traces-endpoint", ENDPOINT, "--port", "0"]
    options += ["--kv-transfer-config", json.dumps(transfer), "--host", "127.0.0.1"]
    args, _ = parse_arguments(make_parser(), ["DIR", *options])
    _, bound = setup_server(args)
    bound.close()
    (told,) = [line for line in lines if line.startswith("non-default args: ")]
    assert "hidden" not in "".join(lines)
    assert f"'otlp_traces_endpoint': '{SHOWN}'" in told
    assert f"{{'auth': '{MASK}', 'apiKey': '{MASK}', 'hosts': ['{SHOWN}']}}" in told
    assert "'hf_token': '**" in told
    # They are masked in the line only.
    assert (args.hf_token, args.otlp_traces_endpoint) == ("hidden", ENDPOINT)
    assert args.kv_transfer_config.kv_connector_extra_config == connector


def test_the_engines_line_has_no_secrets_either(lines: list[str]) -> None:
    """It shows the configuration by its text."""
    mask_logs()
    mask_logs()
    found = ObservabilityConfig(otlp_traces_endpoint=ENDPOINT)
    logger = init_logger("vllm.v1.engine.core")
    logger.info("Initializing a V1 LLM engine (v%s) with config: %s", "1", found)
    logger.info("no secret: %s", "a?b=c")
    assert lines[0].startswith("Initializing a V1 LLM engine (v1) with config: ")
    assert f"otlp_traces_endpoint='{SHOWN}'" in lines[0]
    assert lines[1] == "no secret: a?b=c"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://b/c?key=hidden", f"s3://b/c?key={MASK}"),
        ("az://b?sv=1&sig=hidden&sr=c", f"az://b?sv=1&sig={MASK}&sr=c"),
        ("https://h?X-Amz-Security-Token=hidden#a", f"https://h?X-Amz-Security-Token={MASK}#a"),
        ("https://h?auth=a%20b", f"https://h?auth={MASK}"),
        ("https://h?max_tokens=3&author=b", "https://h?max_tokens=3&author=b"),
        ({"auth": "hidden", "proxy_auth": ["a"]}, {"auth": MASK, "proxy_auth": MASK}),
        ({"author": "a", "auth": True}, {"author": "a", "auth": True}),
        ({"bos_token": "<s>", "hf_token": "a"}, {"bos_token": "<s>", "hf_token": MASK}),
    ],
)
def test_names_in_queries_and_objects_tell_what_is_secret(value: Any, shown: Any) -> None:
    assert masked(value) == shown
