"""What the chart's pages and notes tell people to type, and that they name what exists."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import promql_parser
import pytest
import yaml
from conftest import tiny_config
from helm_render import (
    CHART,
    FULL,
    HPA,
    HUB,
    NODES,
    NOTES,
    REPOSITORY,
    adapter_rule,
    of_kind,
    pods,
    render,
    render_files,
    series_of,
    slicing_job,
    with_values,
)

from sliceserve.server.serve import make_parser
from sliceserve.slicing.arguments import make_parser as make_slicing_parser
from sliceserve.slicing.cli import main


def test_the_notes_commands_are_typed_one_after_the_other() -> None:
    notes = render_files(HUB)[NOTES]
    job = slicing_job(HUB)["metadata"]["name"]
    assert f"logs -f --pod-running-timeout=30m job/{job}\n" in notes
    assert " &\n" not in notes
    forward, another, ask = notes[notes.index("kubectl -n llm port-forward") :].splitlines()[:3]
    assert forward.endswith("svc/demo-sliceserve 8000:80")
    assert "another terminal" in another
    assert ask.strip().startswith("curl http://localhost:8000/")


@pytest.mark.parametrize(
    ("image", "server", "dockerfile"),
    [
        ({}, {}, "deploy/Dockerfile"),
        ({"tag": "mine"}, {"gpuResource": ""}, "deploy/Dockerfile.cpu"),
        ({"digest": f"sha256:{'0' * 64}"}, {}, "deploy/Dockerfile"),
    ],
)
def test_who_names_no_image_is_told_how_to_make_one(
    image: dict[str, str], server: dict[str, str], dockerfile: str
) -> None:
    """What is built is pushed, and is what pods run after the upgrade."""
    values: dict[str, Any] = HUB | {"image": image, "server": server}
    notes = render_files(values)[NOTES]
    lines = [line.strip() for line in notes.splitlines()]
    (build,) = (line.split() for line in lines if line.startswith("docker build"))
    (push,) = (line.split() for line in lines if line.startswith("docker push"))
    (upgrade,) = (line.split() for line in lines if line.startswith("helm upgrade demo"))
    assert build[build.index("-f") + 1] == dockerfile
    assert (REPOSITORY / dockerfile).is_file()
    assert "published nowhere" in notes[: notes.index("docker build")]
    for flag, expression in pairwise(upgrade):
        if flag == "--set":
            image = image | helm_python.parse_set_string(expression)["image"]
    after = render(values | {"image": image})
    images = {found["image"] for pod in pods(after) for found in pod["spec"]["containers"]}
    assert images == {build[build.index("-t") + 1]} == set(push[2:])
    assert upgrade[upgrade.index("-n") + 1] == "llm"
    assert "docker" not in render_files(values | {"image": image})[NOTES]


@pytest.mark.parametrize(
    ("values", "model", "fractions"),
    [
        (with_values(HUB, "slice.fraction", 0.3), "owner/name", [0.3]),
        (
            NODES,
            "meta-llama/Llama-2-70b-hf",
            None,
        ),  # a size is said, and plan has a fraction of its own
        (HPA, "MODEL", [0.25]),
    ],
)
def test_the_notes_plan_is_made(
    values: dict[str, Any],
    model: str,
    fractions: list[float] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line as it is typed, and then with a model whose config is here."""
    lines = [line.strip() for line in render_files(values)[NOTES].splitlines()]
    (line,) = (line for line in lines if line.startswith("sliceserve "))
    _, *words = shlex.split(line)
    options = make_slicing_parser().parse_args(words)
    assert (options.command, options.model, options.fraction) == ("plan", model, fractions)
    assert options.gpu_memory == 40 * 2**30
    config = tiny_config(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    assert main([str(tmp_path) if word == model else word for word in words]) == 0
    table = capsys.readouterr().out
    for form in ("dense", *(f"{fraction:g} dense" for fraction in fractions or [0.25])):
        (row,) = re.findall(rf"^{form} +bfloat16 .*", table, re.MULTILINE)
        # It is tiny.
        assert row.split()[-2:] == ["1", "1"]


PROMETHEUS = {"monitoring": {"monitor": "pod"}}
INGRESS = {"ingress": {"enabled": True, "host": "llm.example.com"}}
ROUTE = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]}}
LET_IN = {"networkPolicy": {"ingressNamespaces": ["monitoring"]}}


@pytest.mark.parametrize(
    ("values", "callers"),
    [
        ({}, None),
        (PROMETHEUS, "Prometheus"),
        (INGRESS, "the Ingress controller"),
        (ROUTE, "the gateway"),
        (PROMETHEUS | ROUTE, "Prometheus and the gateway"),
        (PROMETHEUS | INGRESS | ROUTE | LET_IN, None),
        (PROMETHEUS | INGRESS | ROUTE | {"networkPolicy": {"enabled": False}}, None),
    ],
)
def test_who_lets_no_namespace_in_is_told_who_stays_out(
    values: dict[str, Any], callers: str | None
) -> None:
    lines = render_files(HUB | values)[NOTES].splitlines()
    said = [line for line in lines if "ingressNamespaces is empty" in line]
    assert bool(said) == bool(callers)
    assert all(f" {callers} reach the server only from the namespace llm." in line for line in said)


COMMANDS = [
    (page, command)
    for page in ("README.md", "docs/operate.md", "helm/sliceserve/README.md")
    for block in re.findall(r"```sh\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    for command in re.findall(r"^helm (?:install|upgrade) (?:.*\\\n)*.*", block, re.MULTILINE)
    if "helm/sliceserve" in command  # and not another chart
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_pages_commands_are_not_refused(page: str, command: str) -> None:
    """With the values that Helm itself makes of --set."""
    words = shlex.split(command, comments=True)
    assert words[3] == "helm/sliceserve"
    values: dict[str, Any] = {}
    for flag, expression in pairwise(words):
        if flag == "--set":
            merged = helm_python.parse_set_string(expression)
            place = values
            # Every expression of the pages has one path.
            while isinstance(merged, dict):
                ((name, merged),) = merged.items()
                if isinstance(merged, dict):
                    place = place.setdefault(name, {})
                else:
                    place[name] = merged
    if {"--reset-then-reuse-values", "-f"} & set(words):
        values = {**HUB, **values}
    assert values
    assert of_kind(render(values), "Job"), page


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in COMMANDS} >= {"docs/operate.md", "helm/sliceserve/README.md"}
    assert any("slice.targetParams=0.75" in command for _, command in COMMANDS)
    assert any("server.replicas=0" in command for _, command in COMMANDS)


def test_the_readme_is_up_to_date_and_says_what_every_value_is() -> None:
    command = [sys.executable, "deploy/chart_readme.py", "helm/sliceserve"]
    page = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert page.stdout == (CHART / "README.md").read_text(), "run `make chart-readme`"
    named = {line.split("`")[1] for line in page.stdout.splitlines() if line.startswith("| `")}

    def leaves(values: dict[str, Any], path: str) -> Iterator[str]:
        for name, value in values.items():
            here = f"{path}.{name}".strip(".")
            if here in named or not isinstance(value, dict):
                yield here
            else:
                yield from leaves(value, here)

    assert set(leaves(yaml.safe_load((CHART / "values.yaml").read_text()), "")) == named


def test_the_operators_page_names_values_and_options_that_exist() -> None:
    """Every dotted value, also of --set, and every option."""
    page = (REPOSITORY / "docs" / "operate.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    tops = "|".join(values)
    named = set(re.findall(rf"(?<=[`' ])((?:{tops})(?:\.[A-Za-z]+)+)(?=[=`])", page))
    assert len(named) > 25
    limits = (f"slice.resources.limits.{name}" for name in ("cpu", "memory"))
    free = ("monitoring.labels.release", *limits)
    for name in named - set(free):
        place: Any = values
        for part in name.split("."):
            assert part in place, name
            place = place[part]
    serve = {flag for action in make_parser()._actions for flag in action.option_strings}
    texts = re.findall(r"server\.extraArgs=\{(--[a-z-]+)", page)
    assert set(texts) <= serve
    for flag in ("--max-requests", "--max-num-seqs", "--probe-timeout"):
        assert flag in page
        assert flag in serve


def test_the_pages_claim_is_one_that_several_nodes_can_read() -> None:
    """And is the one that the command after it names."""
    page = (REPOSITORY / "docs" / "operate.md").read_text()
    (text,) = re.findall(r"<<'END'\n(.*?)^END$", page, re.DOTALL | re.MULTILINE)
    claim = yaml.safe_load(text)
    for version in ("1.28", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(claim, version, strict=True)
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (command,) = (words for _, words in COMMANDS if "server.replicas=2" in words)
    assert f"checkpoints.existingClaim={claim['metadata']['name']} " in command


def test_the_pages_links_to_its_own_headings_lead_somewhere() -> None:
    page = (REPOSITORY / "docs" / "operate.md").read_text()
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    readme = (CHART / "README.md").read_text()
    named = set(re.findall(r"\]\(#([a-z-]+)\)", page))
    named |= set(re.findall(r"docs/operate\.md#([a-z-]+)\)", readme))
    assert named >= {"install", "more-replicas", "more-nodes"}
    assert named <= anchors


def test_the_pages_rule_for_an_adapter_is_one_of_what_both_scalers_ask_for() -> None:
    """What it finds in a real Prometheus is in test_chart_server.py."""
    rule = adapter_rule()
    # All fields of prometheus-adapter's rules, but seriesFilters.
    assert rule.keys() == {"seriesQuery", "resources", "name", "metricsQuery"}
    assert rule["resources"] == {
        "overrides": {name: {"resource": name} for name in ("namespace", "pod")}
    }
    (scaled,), (scaler,) = (
        of_kind(render(values), kind)
        for values, kind in ((FULL, "ScaledObject"), (HPA, "HorizontalPodAutoscaler"))
    )
    keda = promql_parser.parse(scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert series_of(promql_parser.parse(rule["seriesQuery"])) == series_of(keda)
    assert rule["name"] == {"as": scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]}
    filled = re.sub(r"<<\.(\w+)>>", r"\1", rule["metricsQuery"])
    # A selector of matchers by name is no PromQL, what they are replaced by is.
    query = promql_parser.parse(filled.replace("{LabelMatchers}", '{pod=~"a|b"}'))
    assert query.prettify() == 'sum by (GroupBy) (Series{pod=~"a|b"})'
