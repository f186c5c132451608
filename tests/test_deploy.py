"""Images, compose file and unit: as far as they can be tried without a container engine."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helm_render import BOARD, REPOSITORY
from test_rules import PROMTOOL, needs_promtool

from sliceserve.server.serve import make_parser, parse_arguments

DEPLOY = REPOSITORY / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GRAFANA = DEPLOY / "grafana" / "provisioning"


def mounts(service: str) -> dict[str, str]:
    """Where the container sees what, for what is not a volume."""
    entries = COMPOSE["services"][service]["volumes"]
    parts = [re.split(r":(?=/)", entry, maxsplit=1) for entry in entries]
    return {inside.removesuffix(":ro"): outside for outside, inside in parts}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint
    found = subprocess.run(
        [hadolint, "--no-color", str(DEPLOY / name)], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_the_compose_file_fits_its_schema() -> None:
    """The newest schema on PyPI; it is older than the project's name in the file."""
    path = Path(sys.prefix) / "compose" / "compose" / "config" / "compose_spec.json"
    check = jsonschema.Draft7Validator(json.loads(path.read_text())).validate
    content = {key: value for key, value in COMPOSE.items() if key != "name"}
    check(content)
    server = content["services"]["server"]
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        check({"services": {"server": server | {"comand": "typo"}}})
    text = (DEPLOY / "compose.cpu.yaml").read_text().replace("!reset null", "{}")
    check(yaml.safe_load(text))


def test_the_image_gets_what_the_wheel_is_built_from() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    for name in let_in:
        assert (REPOSITORY / name).exists(), name
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    assert {"pyproject.toml", "README.md", "LICENSE", *folders} <= let_in


def test_the_server_takes_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICESERVE_API_KEY", "a-key")
    command = COMPOSE["services"]["server"]["command"]
    words = [word.replace("${MODEL_NAME:-sliced}", "sliced") for word in command]
    assert words.pop(0) == "serve"
    args, settings = parse_arguments(make_parser(), words)
    assert mounts("server")[args.model].startswith("${CHECKPOINT")
    assert settings.metrics_public
    assert settings.api_key
    assert "SLICESERVE_API_KEY" in COMPOSE["services"]["server"]["environment"]
    grace = COMPOSE["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= settings.drain_timeout + 30


def test_the_unit_leaves_time_to_drain() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((DEPLOY / "sliceserve.service").read_text())
    service = unit["Service"]
    program, command, *rest = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("sliceserve", "serve")
    args, settings = parse_arguments(make_parser(), rest)
    assert args.host == "0.0.0.0"
    assert settings.api_key_file
    assert int(service["TimeoutStopSec"]) >= settings.drain_timeout + 30
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    # Starts that fail come to an end.
    limits = unit["Unit"]
    pauses = int(limits["StartLimitBurst"]) * int(service["RestartSec"])
    assert pauses < int(limits["StartLimitIntervalSec"])


@needs_promtool
def test_prometheus_takes_its_file() -> None:
    assert PROMTOOL
    path = DEPLOY / "prometheus.yml"
    checked = subprocess.run(
        [PROMTOOL, "check", "config", str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_prometheus_and_grafana_find_what_they_need() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert f"--port={port}" in COMPOSE["services"][host]["command"]
    for service in ("prometheus", "grafana"):
        for outside in mounts(service).values():
            assert outside in COMPOSE["volumes"] or (DEPLOY / outside).exists(), outside
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"].removeprefix("http://").split(":")[0] in COMPOSE["services"]
    assert source["isDefault"]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards" / "board.yaml").read_text())["providers"]
    seen = mounts("grafana")[provider["options"]["path"]]
    assert (DEPLOY / seen).resolve() == BOARD.parent
