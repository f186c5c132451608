"""The chart rendered by a real Helm, offline."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import promql_parser
import yaml
from helm_python import _native

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "helm" / "sliceserve"
BOARD = CHART / "dashboards" / "sliceserve.json"
# Exported where NVML answers only; test_gpus.py has their names and labels.
GPU_SERIES = {
    f"sliceserve_gpu_{name}"
    for name in ("memory_used_bytes", "memory_total_bytes", "utilization_ratio")
}
SCENARIOS = sorted(CHART.glob("ci/*-values.yaml"))

Manifest = dict[str, Any]


def scenario(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def render_files(
    values: dict[str, Any],
    kube_version: str = "1.33.0",
    chart: Path = CHART,
    release: str = "demo",
) -> dict[str, str]:
    """Render every template, checked against the schema; also NOTES.txt."""
    loaded = helm_python.Chart.load(chart)
    loaded.validate_schema(values)
    options = {"name": release, "namespace": "llm", "kube_version": kube_version}
    # The public method cannot set a namespace beside a version in this release.
    rendered: dict[str, str] = json.loads(
        _native.call_string("helm_render", loaded._raw(), json.dumps(values), json.dumps(options))
    )
    return rendered


def render(
    values: dict[str, Any],
    kube_version: str = "1.33.0",
    chart: Path = CHART,
    release: str = "demo",
) -> list[Manifest]:
    """Render every manifest."""
    files = render_files(values, kube_version, chart, release)
    return [
        manifest
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for manifest in yaml.safe_load_all(text)
        if manifest
    ]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def rule_expressions(values: dict[str, Any]) -> list[Any]:
    """Parse the expression of every rule.

    Raises:
        ValueError: one is not PromQL.

    """
    (rule,) = of_kind(render(values), "PrometheusRule")
    return [
        promql_parser.parse(rule["expr"])
        for group in rule["spec"]["groups"]
        for rule in group["rules"]
    ]


def board() -> dict[str, Any]:
    """Read the board."""
    content: dict[str, Any] = json.loads(BOARD.read_text())
    return content


def board_expressions() -> list[Any]:
    """Parse the query of every panel of the board, with a value for what Grafana fills in.

    Raises:
        ValueError: one is not PromQL.

    """
    return [
        promql_parser.parse(target["expr"].replace("$__rate_interval", "1m"))
        for panel in board()["panels"]
        for target in panel.get("targets", [])
    ]


def selectors_of(expression: Any) -> list[Any]:
    """What a parsed expression selects."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        # The selector of a range is no node of its own.
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql_parser.VectorSelector):
            found.append(selector)

    promql_parser.walk(expression, visit)
    return found


def series_of(expression: Any) -> set[str]:
    """Names of the series that a parsed expression selects."""
    return {selector.name for selector in selectors_of(expression)}


def asked_now(selector: Any, without: str = "") -> str:
    """A selector as a query: its name and matchers, but for those of one label, and no offset."""
    signs = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
    matchers = ",".join(
        f"{matcher.name}{signs[str(matcher.op).rpartition('.')[2]]}{json.dumps(matcher.value)}"
        for matcher in selector.matchers.matchers
        if matcher.name != without
    )
    return f"{selector.name}{{{matchers}}}"


FULL = scenario(CHART / "ci" / "full-values.yaml")
NODES = scenario(CHART / "ci" / "nodes-values.yaml")
HPA = scenario(CHART / "ci" / "hpa-values.yaml")
NOTES = "sliceserve/templates/NOTES.txt"
HUB: Manifest = {"model": {"hub": "owner/name"}}


def adapter_rule() -> dict[str, Any]:
    """The rule for prometheus-adapter that the operator's page has."""
    page = (REPOSITORY / "docs" / "operate.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (rule,) = yaml.safe_load(block)
    return dict(rule)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a selector of the chart's finds a pod."""
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(wanted["key"]) in wanted["values"]
        for wanted in selector.get("matchExpressions", [])
    )


def with_values(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of values with one of them changed."""
    copy: dict[str, Any] = json.loads(json.dumps(base))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return copy


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Metadata and spec of every pod of a release."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest
        elif manifest["kind"] in ("Job", "Deployment"):
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group["leaderTemplate"], group["workerTemplate"])


def server_pod(values: dict[str, Any]) -> Manifest:
    (deployment,) = of_kind(render(values), "Deployment")
    template: Manifest = deployment["spec"]["template"]
    return template


def slicing_job(values: dict[str, Any]) -> Manifest:
    (job,) = of_kind(render(values), "Job")
    return job


def output_of(job: Manifest) -> str:
    directory: str = job["spec"]["template"]["spec"]["containers"][0]["command"][3]
    return directory
