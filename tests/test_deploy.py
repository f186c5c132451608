"""Images, compose file and unit: as far as they can be tried without a container engine."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from helm_render import BOARD, CHART, REPOSITORY, board
from packaging.requirements import Requirement
from programs import needs
from test_rules import PROMTOOL, needs_promtool

from sliceserve.server.ending import LAST_S
from sliceserve.server.serve import make_parser, parse_arguments

DEPLOY = REPOSITORY / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GRAFANA = DEPLOY / "grafana" / "provisioning"
UNIT = (DEPLOY / "sliceserve.service").read_text()
SYSTEMD_ANALYZE = shutil.which("systemd-analyze")

needs_systemd = needs(SYSTEMD_ANALYZE, "no systemd-analyze: `apt-get install systemd` gives one")


def mounts(service: str) -> dict[str, str]:
    """Where the container sees what, for what is not a volume."""
    entries = COMPOSE["services"][service]["volumes"]
    parts = [re.split(r":(?=/)", entry, maxsplit=1) for entry in entries]
    return {inside.removesuffix(":ro"): outside for outside, inside in parts}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint
    found = subprocess.run(
        [hadolint, "--no-color", str(DEPLOY / name)], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def parsed(name: str, **arguments: str) -> DockerfileParser:
    """A Dockerfile; its labels are those of the last stage, with arguments filled in."""
    content = BytesIO((DEPLOY / name).read_bytes())
    return DockerfileParser(fileobj=content, build_args=arguments)


@pytest.fixture(params=DOCKERFILES)
def image(request: pytest.FixtureRequest) -> DockerfileParser:
    return parsed(request.param, REVISION="0f1e2d")


def last_stage(image: DockerfileParser) -> list[tuple[str, str]]:
    """Instructions and what they are given."""
    steps = [(step["instruction"], step["value"]) for step in image.structure]
    start = max(n for n, (name, _) in enumerate(steps) if name == "FROM")
    return [step for step in steps[start:] if step[0] != "COMMENT"]


def test_an_image_says_what_it_is(image: DockerfileParser) -> None:
    """And not what its base image is, which has labels of these names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in image.labels)
    labels = {name.removeprefix(prefix): value for name, value in image.labels.items()}
    assert labels.pop("description")
    assert labels.pop("base.name") == image.parent_images[-1]
    assert labels == {
        "title": project["name"],
        "licenses": project["license"],
        "version": project["version"],
        "revision": "0f1e2d",
    }
    # Whatever comes after an argument is built anew for each of its values.
    after = [name for name, _ in last_stage(image)]
    assert [name for name in after[after.index("ARG") :] if name != "ARG"] == [
        "LABEL", "ENTRYPOINT", "CMD",
    ]  # fmt: skip
    for name in DOCKERFILES:
        assert parsed(name).labels["org.opencontainers.image.revision"] == "unknown"


def test_the_base_is_named_as_it_was_built_from() -> None:
    name = "org.opencontainers.image.base.name"
    for version in ("v0.24.0", "v0.32.0"):
        image = parsed("Dockerfile", VLLM=version)
        assert (
            image.labels[name] == image.parent_images[-1] == f"docker.io/vllm/vllm-openai:{version}"
        )


def test_base_images_are_pinned_to_a_patch(image: DockerfileParser) -> None:
    """By names that are whole: what is short is looked for elsewhere by Podman."""
    assert len(image.parent_images) == 2
    for base in image.parent_images:
        assert re.fullmatch(r"docker\.io/\w+/[a-z-]+:v?\d+\.\d+\.\d+(-[a-z-]+)?", base), base


def test_ray_is_pinned_to_a_version_that_the_package_takes() -> None:
    """vLLM requires none, so that whichever is newest would come."""
    (run,) = (value for name, value in last_stage(parsed("Dockerfile")) if "pip install" in value)
    (version,) = re.findall(r" ray==(\d+\.\d+\.\d+)(?: |$)", run)
    assert '"${wheel}[ray]"' in run
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["ray"])
    assert wanted.name == "ray"
    assert version in wanted.specifier


def test_an_image_runs_as_nobody_in_particular_and_has_no_model(image: DockerfileParser) -> None:
    steps = last_stage(image)
    *_, user = (value for name, value in steps if name == "USER")
    assert re.fullmatch(r"([1-9]\d*):([1-9]\d*)", user), "a number, as Kubernetes can tell"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert user == ":".join(2 * [str(values["podSecurity"]["user"])])
    # Nothing of the context but what has been built from it, and nothing that is fetched.
    assert not any(name == "ADD" for name, _ in steps)
    copied = [value.split() for name, value in steps if name == "COPY"]
    assert all(words[0] == "--from=environment" and words[1:] == 2 * ["/venv"] for words in copied)
    fetches = r"safetensors|gguf|hugging|hf_|snapshot|curl|wget|git clone|sliceserve slice"
    assert not re.search(fetches, image.content.lower().partition("\nfrom ")[2])
    (volume,) = (value for name, value in steps if name == "VOLUME")
    made = [value for name, value in steps if name == "RUN" and volume in value.split()]
    assert made == [f"install -d -o {user.split(':')[0]} -g {user.split(':')[1]} {volume}"]
    assert (image.cmd, dict(steps)["ENTRYPOINT"]) == ('["--help"]', '["sliceserve"]')


@pytest.mark.parametrize("status", [200, 503])
def test_an_image_is_healthy_while_the_server_lives(image: DockerfileParser, status: int) -> None:
    """The check's own command, on a port where something answers; where there is a proxy, too."""
    (check,) = (value for name, value in last_stage(image) if name == "HEALTHCHECK")
    options, command = check.split("CMD ")
    program, *arguments = json.loads(command)
    assert (program, arguments[0]) == ("python3", "-c")
    # A load of half an hour is none of its business; its patience is that of the chart's probe.
    assert options.split() == ["--interval=15s", "--timeout=15s", "--start-period=40m"]
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert "8000" in dict(last_stage(image))["EXPOSE"]
        code = arguments[1].replace("8000", str(server.server_port))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={"http_proxy": "http://proxy.invalid:3128"},
            check=False,
        )
        server.shutdown()
    assert asked == ["/livez"]
    assert (done.returncode == 0) == (status == 200)


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


def test_the_composed_server_may_do_little() -> None:
    """What the chart's pods may: no rights to gain, and no place to write but its caches."""
    server = COMPOSE["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert server["tmpfs"] == ["/tmp"]
    writable = [volume for volume in server["volumes"] if not volume.endswith(":ro")]
    assert writable == ["cache:/cache"]
    assert not server.keys() & {"privileged", "cap_add", "user", "pid", "ipc", "network_mode"}
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    text = (DEPLOY / "compose.cpu.yaml").read_text().replace("!reset null", "{}")
    (changed,) = yaml.safe_load(text)["services"].values()
    assert changed.keys() == {"image", "build", "deploy"}, "and on a CPU it is the same"


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
    assert int(grace.removesuffix("s")) > settings.drain_timeout + LAST_S


def test_the_unit_leaves_time_to_drain() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT)
    service = unit["Service"]
    program, command, *rest = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("sliceserve", "serve")
    args, settings = parse_arguments(make_parser(), rest)
    assert args.host == "0.0.0.0"
    assert settings.api_key_file
    assert int(service["TimeoutStopSec"]) > settings.drain_timeout + LAST_S
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    # Starts that fail come to an end.
    limits = unit["Unit"]
    pauses = int(limits["StartLimitBurst"]) * int(service["RestartSec"])
    assert pauses < int(limits["StartLimitIntervalSec"])


def systemd_analyze(*arguments: str, unit: str, directory: Path) -> tuple[int, list[str]]:
    """The exit code, and what is said about the unit with the environment's own program."""
    assert SYSTEMD_ANALYZE
    path = directory / "sliceserve.service"
    program = Path(sys.executable).with_name("sliceserve")
    path.write_text(unit.replace("/opt/sliceserve/bin/sliceserve", str(program)))
    done = subprocess.run(
        [SYSTEMD_ANALYZE, *arguments, str(path)], capture_output=True, text=True, check=False
    )
    return done.returncode, [line for line in done.stderr.splitlines() if path.name in line]


@needs_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert systemd_analyze("verify", "--man=no", unit=UNIT, directory=tmp_path) == (0, [])


@needs_systemd
@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("KillMode=mixed", "KillMod=mixed", "Unknown key"),
        ("Restart=on-failure", "Restart=on-failing", "Failed to parse"),
        ("TimeoutStopSec=160", "TimeoutStopSec=160 parsecs", "Failed to parse"),
        ("/opt/sliceserve/bin/", "/opt/sliceserve/", "is not executable"),
    ],
)
def test_systemd_says_what_is_wrong_with_a_unit(
    right: str, wrong: str, complaint: str, tmp_path: Path
) -> None:
    assert UNIT.count(right) == 1
    broken = UNIT.replace(right, wrong)
    _, (said, *_) = systemd_analyze("verify", "--man=no", unit=broken, directory=tmp_path)
    assert complaint in said


@needs_systemd
def test_the_unit_leaves_the_server_little_of_the_machine(tmp_path: Path) -> None:
    """In tenths of systemd's measure of exposure, which is 10 at most."""
    judge = ("security", "--offline=yes", "--threshold=60")
    assert systemd_analyze(*judge, unit=UNIT, directory=tmp_path)[0] == 0
    bare = re.sub(r"(?m)^(No|Protect|Private|Restrict|Capability).*\n", "", UNIT)
    assert systemd_analyze(*judge, unit=bare, directory=tmp_path)[0] == 1


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


def test_compose_pins_what_it_does_not_build() -> None:
    services = COMPOSE["services"]
    images = {name: service["image"] for name, service in services.items()}
    built = {name for name, service in services.items() if "build" in service}
    assert built == {"server"}
    for name in images.keys() - built:
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", images[name]), name
    build = services["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == REPOSITORY
    override = (DEPLOY / "compose.cpu.yaml").read_text().replace("!reset null", "{}")
    for one in (build, yaml.safe_load(override)["services"]["server"]["build"]):
        assert (REPOSITORY / one["dockerfile"]).is_file()


def test_the_readmes_command_sets_what_compose_asks_for() -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    (command,) = (line for line in lines if "docker compose -f" in line)
    before, words = command.split("docker compose ")
    assert {word.partition("=")[0] for word in before.split()} == wanted
    assert (REPOSITORY / words.split()[1]).samefile(DEPLOY / "compose.yaml")


def test_both_images_find_their_files_where_they_look() -> None:
    """In the places that Prometheus' and Grafana's own images are made with."""
    assert mounts("prometheus") == {
        "/etc/prometheus/prometheus.yml": "./prometheus.yml",
        "/prometheus": "metrics",
    }
    (inside,) = (to for to, out in mounts("grafana").items() if out == "./grafana/provisioning")
    assert inside == "/etc/grafana/provisioning"
    # Folders of other names are not read.
    assert {path.name for path in GRAFANA.iterdir()} == {"dashboards", "datasources"}
    settings = COMPOSE["services"]["grafana"]["environment"]
    home = Path(settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / mounts("grafana")[str(home.parent)] / home.name).samefile(BOARD)
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (variable,) = (one for one in board()["templating"]["list"] if one["type"] == "datasource")
    assert variable["query"] == source["type"]
