"""Where a setting comes from, and what is refused."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from sliceserve.server.serve import main, make_parser, parse_arguments
from sliceserve.slicing.cli import main as command_line
from sliceserve.slicing.errors import UserError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLICESERVE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["DIR", *arguments, "--print-config"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def config(directory: Path, text: str) -> str:
    file = directory / "config.yaml"
    file.write_text(text)
    return str(file)


def test_a_flag_beats_the_environment_and_that_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, "drain-timeout: 1\nprobe_timeout: 1\nmetrics-public: true\n")
    monkeypatch.setenv("SLICESERVE_DRAIN_TIMEOUT", "2")
    monkeypatch.setenv("SLICESERVE_PROBE_TIMEOUT", "2")
    shown = printed(capsys, "--config", file, "--drain-timeout", "3")
    assert (shown["drain-timeout"], shown["probe-timeout"]) == (3, 2)
    assert shown["metrics-public"] is True
    # A flag wins even where it repeats the file.
    assert printed(capsys, f"--config={file}", "--drain-timeout", "1")["drain-timeout"] == 1


def test_the_options_of_vllm_pass_through_from_flags_and_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = config(tmp_path, "max-model-len: 77\nenforce-eager: true\n")
    shown = printed(capsys, "--config", file, "--max_num_seqs", "3")
    assert shown["max-model-len"] == 77
    assert shown["enforce-eager"] is True
    assert shown["max-num-seqs"] == 3


def test_cors_is_off_and_can_be_switched_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert "allowed-origins" not in printed(capsys)
    shown = printed(capsys, "--allowed-origins", '["https://a.example"]')
    assert shown["allowed-origins"] == ["https://a.example"]


@pytest.mark.parametrize("source", ["flag", "environment", "vllm", "file"])
def test_keys_are_taken_from_anywhere_and_never_shown(
    source: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--hf-token", "secret-3"]
    if source == "flag":
        arguments += ["--api-key", "secret-1", "secret-2"]
    elif source == "file":
        arguments += ["--config", config(tmp_path, "api-key: [secret-1, secret-2]\n")]
    else:
        name = {"environment": "SLICESERVE_API_KEY", "vllm": "VLLM_API_KEY"}[source]
        monkeypatch.setenv(name, "secret-1,\nsecret-2,")
    assert main(["DIR", *arguments, "--print-config"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["api-key"]) == 2
    assert "secret" not in captured.out + captured.err


def test_keys_leave_the_environment_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What vLLM starts inherits the rest."""
    names = ("SLICESERVE_API_KEY", "sliceserve_api_key", "SliceServe_Api_Key", "VLLM_API_KEY")
    for name in names:
        monkeypatch.setenv(name, "secret")
    file = "sliceserve_api_key_file"
    monkeypatch.setenv(file, "keys")
    _, settings = parse_arguments(make_parser(), ["DIR"])
    assert [key.get_secret_value() for key in settings.api_key] == ["secret"]
    assert not os.environ.keys() & set(names)
    assert (settings.api_key_file, os.environ[file]) == (Path("keys"), "keys")


def test_secrets_within_the_options_of_vllm_are_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What loaders and connectors take is theirs; some of it vLLM parses into objects."""
    options = {
        "model-loader-extra-config": {"s3_secret_access_key": "hidden", "concurrency": 3},
        "kv-transfer-config": {
            "kv_connector": "a", "kv_role": "kv_both",
            "kv_connector_extra_config": {"hosts": [{"password": "hidden"}], "apiKey": "hidden"},
        },
        "additional-config": {"authorization": {"user": "hidden"}, "passwords": ["hidden"]},
        "speculative-config": {"method": "ngram", "num_speculative_tokens": 3},
        "otlp-traces-endpoint": "https://user:hidden@collector.example:4317/a@b",
    }  # fmt: skip
    arguments = [
        word
        for name, value in options.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    shown = printed(capsys, *arguments)
    mask = "**********"
    assert "hidden" not in json.dumps(shown)
    assert shown["model-loader-extra-config"] == {"s3_secret_access_key": mask, "concurrency": 3}
    connector = shown["kv-transfer-config"]
    assert (connector["kv_connector"], connector["kv_role"]) == ("a", "kv_both")
    assert connector["kv_connector_extra_config"] == {"hosts": [{"password": mask}], "apiKey": mask}
    assert shown["additional-config"] == {"authorization": mask, "passwords": mask}
    assert shown["speculative-config"] == options["speculative-config"]
    assert shown["otlp-traces-endpoint"] == f"https://{mask}@collector.example:4317/a@b"
    assert printed(capsys, "--hf-token")["hf-token"] is True


def test_every_option_of_vllm_that_looks_like_a_secret_is_known() -> None:
    """A new one may need a look: is it masked, and rightly?"""
    looks = re.compile(r"key|token(?!s|izer)|secret|pass|credential|auth", re.IGNORECASE)
    args, _ = parse_arguments(make_parser(), ["DIR"])
    found = {name for name in vars(args) if looks.search(name)}
    known = {
        "allow_credentials", "api_key", "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold", "hf_token", "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive", "return_tokens_as_token_ids", "ssl_keyfile",
    }  # fmt: skip
    assert {"api_key", "hf_token"} <= found <= known


def test_an_unknown_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["DIR", "--drain-time-out", "3"])
    assert caught.value.code == 2
    assert "--drain-time-out" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["drane: 3", "drane: false", "drane: []", "metrics.public: {}"])
def test_an_unknown_key_in_the_file_is_an_error(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line.split(":")[0]):
        main(["DIR", "--config", config(tmp_path, f"{line}\n"), "--print-config"])


def test_an_unknown_key_in_the_file_ends_the_command_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = config(tmp_path, "drane-timeout: 3\n")
    assert command_line(["serve", "DIR", "--config", file]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = f"sliceserve: error: --config {file!r}: there is no option 'drane-timeout'\n"
    assert captured.err == said


@pytest.mark.parametrize("name", ["SLICESERVE_DRAIN_TIME", "sliceserve_drain_time"])
def test_an_unknown_variable_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(UserError, match=f"{name}: there is no such setting"):
        main(["DIR", "--print-config"])


def test_variables_of_kubernetes_services_are_no_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"SLICESERVE_{name}", "10.0.0.1")
        monkeypatch.setenv(f"SLICESERVE_7B_CHAT_{name}", "10.0.0.1")
    assert printed(capsys)["drain-timeout"] == 30


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("drain-timeout", "-1", "greater than or equal to 0"),
        ("drain-timeout", "inf", "finite"),
        ("start-timeout", "-1", "greater than or equal to 0"),
        ("start-timeout", "inf", "finite"),
        ("probe-timeout", "0", "greater than 0"),
        ("probe-timeout", "soon", "valid number"),
    ],
)
def test_a_bad_value_is_named_with_its_source(
    option: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"^--{option} '{value}': .*{reason}"):
        main(["DIR", f"--{option}", value])
    name = f"SLICESERVE_{option.replace('-', '_').upper()}"
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{name} '{value}': .*{reason}"):
        main(["DIR"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid", "192.0.2.1"])
def test_without_a_key_only_this_machine_is_served(host: str, tiny_sliced: Path) -> None:
    with pytest.raises(UserError, match=f"--host {host}: .*--insecure"):
        main([str(tiny_sliced), "--host", host])


def test_tls_is_checked_before_the_address(tiny_sliced: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--port", str(taken.getsockname()[1]), "--ssl-keyfile", "key.pem"]
        with pytest.raises(UserError, match=r"^--ssl-keyfile key\.pem: there is no --ssl-certfile"):
            main([str(tiny_sliced), *arguments])


def test_limits_of_keys_need_keys(tiny_sliced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICESERVE_KEY_TOKENS_PER_MINUTE", "7")
    with pytest.raises(UserError, match="--key-tokens-per-minute 7: there is no API key"):
        main([str(tiny_sliced)])


def test_an_unusable_key_file_is_named(tmp_path: Path, tiny_sliced: Path) -> None:
    file = tmp_path / "keys"
    arguments = [str(tiny_sliced), "--api-key-file", str(file)]
    with pytest.raises(UserError, match=r"--api-key-file '.*keys': No such file"):
        main(arguments)
    file.write_text("# none yet\n\n")
    with pytest.raises(UserError, match="there is no key in it"):
        main(arguments)
    file.write_text("good\nhidden secret\n")
    with pytest.raises(UserError, match="line 2: a key is made of printable ASCII") as caught:
        main(arguments)
    assert "hidden" not in str(caught.value)
